"""The API server, as this program uses it: list, watch, create, server-side apply, merge patch, delete,
status.

Owns: every request but the discovery that kopf makes when it starts, paths, timeouts and the mapping of HTTP errors
to our tree. The only user of the kubernetes client. Decides nothing and retries nothing; objects are plain dicts.
Safe to use from several threads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
from kubernetes import client, config

from toka_operator.errors import (
    ApiError,
    ConflictError,
    GoneError,
    NamespaceEndsError,
    NotFoundError,
    NotLeaderError,
    TransientError,
    WriteFailsError,
)
from toka_operator.failures import WEBHOOK_FAILS
from toka_operator.fields import Json
from toka_operator.settings import FIELD_MANAGER, GROUP, PLURAL, VERSION

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 15.0
"""Longest silence within the answer to a read."""
WATCHES_PER_TIMEOUT = 4
"""Many watches live longer: no more of them are renewed in a second than this."""
WATCH_SILENCE_S = 5.0
"""A stream without a byte for so much longer than its life is given up."""
LIST_PAGE = 500

_PATHS = {
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "Service": ("api/v1", "services"),
    "Pod": ("api/v1", "pods"),
    "Node": ("api/v1", "nodes"),
    "PersistentVolumeClaim": ("api/v1", "persistentvolumeclaims"),
    "Event": ("api/v1", "events"),
    "StatefulSet": ("apis/apps/v1", "statefulsets"),
    "ControllerRevision": ("apis/apps/v1", "controllerrevisions"),
    "PodDisruptionBudget": ("apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("apis/networking.k8s.io/v1", "networkpolicies"),
    "HorizontalPodAutoscaler": ("apis/autoscaling/v2", "horizontalpodautoscalers"),
    "PodMonitor": ("apis/monitoring.coreos.com/v1", "podmonitors"),
    "InferencePool": ("apis/inference.networking.k8s.io/v1", "inferencepools"),
    "HTTPRoute": ("apis/gateway.networking.k8s.io/v1", "httproutes"),
    "EndpointSlice": ("apis/discovery.k8s.io/v1", "endpointslices"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    "TokaDeployment": (f"apis/{GROUP}/{VERSION}", PLURAL),
}
_JSON, _APPLY, _MERGE = "application/json", "application/apply-patch+yaml", "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Page:
    """A complete list and the version to watch from."""

    items: list[Json]
    resource_version: str


class Cluster:
    """A connection to one API server. `write_window_s` says how long a write may take that begins now: 0.0 if we may
    not write. Leases are not asked about: they have `lease_timeout_s`."""

    def __init__(
        self,
        api_client: Any,
        write_window_s: Callable[[], float],
        lease_timeout_s: float = READ_TIMEOUT_S,
        watch_timeout_s: int = 25,
        ca_file: Path | None = None,
    ) -> None:
        self._api = api_client
        self._write_window_s = write_window_s
        self._lease_timeout_s = lease_timeout_s
        self._watch_timeout_s = watch_timeout_s
        self._ca_file = ca_file
        self._ca = _read_bytes(ca_file)
        self.last_answer = time.monotonic()
        """The time at which the API server last answered anything."""

    def has_outdated_ca(self) -> bool:
        """Whether the certificate authority's file is another than was read at the start: only a new process reads
        it again."""
        current = _read_bytes(self._ca_file)
        return bool(current) and current != self._ca

    def list_all(self, kind: str, namespace: str | None, selector: str = "", field_selector: str = "") -> Page:
        """Every object of a kind, page by page. `namespace` None: the whole cluster."""
        query: list[tuple[str, Any]] = [("limit", LIST_PAGE)]
        if selector:
            query.append(("labelSelector", selector))
        if field_selector:
            query.append(("fieldSelector", field_selector))
        items: list[Json] = []
        token = ""
        while True:
            page = self._request("GET", _path(kind, namespace), [*query, ("continue", token)] if token else query)
            version = _read_version(page)
            items += page.get("items") or []
            token = page["metadata"].get("continue", "")
            if not token:
                return Page(items, version)

    def read_version(self, kind: str, namespace: str | None) -> str:
        """The version to watch a kind from, for whoever needs nothing of what is there already."""
        return _read_version(self._request("GET", _path(kind, namespace), [("limit", 1)]))

    def watch(
        self, kind: str, namespace: str | None, resource_version: str, selector: str = "", field_selector: str = ""
    ) -> Iterator[Json]:
        """Watch events until the server ends the stream. Raises GoneError when the version is too old."""
        query = [
            ("watch", "true"),
            ("labelSelector", selector),
            ("fieldSelector", field_selector),
            ("resourceVersion", resource_version),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", self._watch_timeout_s),
        ]
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=self._watch_timeout_s + WATCH_SILENCE_S)
        response = self._send("GET", _path(kind, namespace), query, None, _JSON, timeout)
        try:
            if response.status >= 400:
                raise _to_error(response.status, response.data, response.headers)
            yield from _read_events(response)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise TransientError(f"watch of {kind} broke: {error}") from error
        finally:
            response.close()
            response.release_conn()

    def read(self, kind: str, namespace: str, name: str) -> Json:
        return self._request("GET", _path(kind, namespace, name), [])

    def create(self, manifest: Json, is_trial: bool = False) -> Json:
        """Return the object as it was made, or of a trial as it would have been. Raises ConflictError if the name is
        taken, by whomever."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        return self._write("POST", path, manifest, _JSON, is_trial)

    def replace(self, manifest: Json) -> Json:
        """Whole-object update; ConflictError if its resourceVersion is not the newest."""
        metadata = manifest["metadata"]
        return self._write("PUT", _path(manifest["kind"], metadata["namespace"], metadata["name"]), manifest, _JSON)

    def apply_status(self, manifest: Json) -> Json:
        """Server-side apply of the status block; ConflictError if the object is not the one with the manifest's uid,
        or not in its resourceVersion."""
        metadata = manifest["metadata"]
        path = _path(manifest["kind"], metadata["namespace"], metadata["name"]) + "/status"
        return self._write("PATCH", path, manifest, _APPLY)

    def merge(self, kind: str, live: Json, patch: Json) -> Json:
        """JSON merge patch of `live`; ConflictError if that is no longer the object, or the newest version of it."""
        metadata = live["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        identity = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        body = {**patch, "metadata": {**patch.get("metadata", {}), **identity}}
        return self._write("PATCH", _path(kind, namespace, name), body, _MERGE)

    def delete(self, kind: str, namespace: str, name: str, uid: str, grace_s: int | None = None) -> Json:
        """Deletes in the background; ConflictError if the object is not the one with this uid. Returns the object, if
        that is still there for a while, else a Status.

        `grace_s` None: the object's own grace period; 0: at once, without waiting for a kubelet.
        """
        body: Json = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        return self._write("DELETE", _path(kind, namespace, name), body, _JSON)

    def _write(self, method: str, path: str, body: Json, content_type: str, is_trial: bool = False) -> Json:
        window_s = self._lease_timeout_s if "/leases" in path else self._write_window_s()
        if window_s <= 0.0:
            raise NotLeaderError(f"{method} {path}: the lease is not held")
        query: list[tuple[str, Any]] = [] if method == "DELETE" else [("fieldManager", FIELD_MANAGER)]
        if is_trial:
            query.append(("dryRun", "All"))
        if content_type == _APPLY:
            query.append(("force", "true"))
        elif method != "DELETE":
            query.append(("fieldValidation", "Strict"))  # a misspelt field of a sidecar is refused by its name
        return self._request(method, path, query, body, content_type, urllib3.Timeout(total=window_s))

    def _request(
        self,
        method: str,
        path: str,
        query: list[tuple[str, Any]],
        body: Json | None = None,
        content_type: str = _JSON,
        timeout: urllib3.Timeout | None = None,
    ) -> Json:
        if timeout is None:
            is_lease = "/leases" in path
            limit_s = self._lease_timeout_s if is_lease else None
            timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S, total=limit_s)
        response = self._send(method, path, query, body, content_type, timeout)
        try:
            data = response.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise TransientError(f"{method} {path}: {error}") from error
        finally:
            response.release_conn()
        if response.status >= 400:
            refusal = _to_error(response.status, data, response.headers)
            is_about_one = method != "GET" and (response.status == 500 or WEBHOOK_FAILS in str(refusal))
            raise WriteFailsError(str(refusal)) if is_about_one and isinstance(refusal, TransientError) else refusal
        return _parse_json(data)

    def _send(
        self,
        method: str,
        path: str,
        query: list[tuple[str, Any]],
        body: Json | None,
        content_type: str,
        timeout: urllib3.Timeout,
    ) -> Any:
        verb, url, headers, *_ = self._api.param_serialize(
            method=method,
            resource_path=path,
            query_params=query,
            header_params={"Accept": _JSON, "Content-Type": content_type},
            auth_settings=["BearerToken"],
        )
        try:
            response = self._api.rest_client.pool_manager.request(
                verb,
                url,
                body=None if body is None else encode_canonically(body),
                headers=headers,
                timeout=timeout,
                preload_content=False,
            )
            self.last_answer = time.monotonic()
            return response
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise TransientError(f"{method} {path}: {error}") from error


def encode_canonically(body: Json) -> bytes:
    """JSON exactly as the API server writes it: sorted, compact, with Go's escapes.

    A ControllerRevision keeps the bytes of its data and compares them on every later patch, whatever that
    changes.
    """
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


def connect(
    num_watches: int,
    num_writers: int,
    write_window_s: Callable[[], float],
    lease_timeout_s: float,
    watch_timeout_s: int,
) -> Cluster:
    """A Cluster from the pod's service account, else from KUBECONFIG."""
    configuration = client.Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        config.load_incluster_config(client_configuration=configuration)
    else:
        path = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
        config.load_kube_config(config_file=path, client_configuration=configuration)
    configuration.connection_pool_maxsize = num_watches + num_writers + 4
    configuration.retries = False
    configuration.keep_alive = True
    ca_file = Path(configuration.ssl_ca_cert) if configuration.ssl_ca_cert else None
    timeout_s = max(watch_timeout_s, num_watches // WATCHES_PER_TIMEOUT)
    return Cluster(client.ApiClient(configuration), write_window_s, lease_timeout_s, timeout_s, ca_file)


def _read_bytes(path: Path | None) -> bytes:
    """Return the contents of a file; nothing if there is none."""
    try:
        return path.read_bytes() if path is not None else b""
    except OSError:
        return b""


def _path(kind: str, namespace: str | None, name: str = "") -> str:
    prefix, plural = _PATHS[kind]
    scope = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
    tail = f"/{quote(name, safe='')}" if name else ""
    return f"/{prefix}{scope}/{plural}{tail}"


def _read_events(response: Any) -> Iterator[Json]:
    buffer = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in filter(None, lines):
            event = _parse_json(line)
            if event.get("type") == "ERROR":
                status = event.get("object") or {}
                raise _to_error(int(status.get("code") or 500), json.dumps(status).encode(), {})
            _read_version(event.get("object"))
            yield event


def _parse_json(data: bytes) -> Json:
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise TransientError("the answer is not JSON") from error
    if not isinstance(parsed, dict):
        raise TransientError("the answer is not a JSON object")
    return parsed


def _read_version(found: Any) -> str:
    """The resource version of a list or an object. Raises TransientError if it is neither: a proxy may answer with
    anything."""
    metadata = found.get("metadata") if isinstance(found, dict) else None
    version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    if not isinstance(version, str) or not version.isdigit():
        raise TransientError("the answer has no resource version")
    return version


def _to_error(status: int, data: bytes, headers: Any) -> ApiError | TransientError:
    try:
        answer = json.loads(data)
        reason, message = str(answer.get("reason", "")), str(answer.get("message", ""))
        causes = [c.get("reason") for c in (answer.get("details") or {}).get("causes") or []]
    except (ValueError, AttributeError):
        causes, reason, message = [], "", data[:200].decode(errors="replace")
    if status == 429 or status >= 500 or status == 401:
        after = headers.get("Retry-After", "")
        return TransientError(f"{status} {reason}: {message}", float(after) if after.isdigit() else None)
    if status == 403 and "NamespaceTerminating" in causes:
        return NamespaceEndsError(status, reason, message)
    kinds: dict[int, type[ApiError]] = {404: NotFoundError, 409: ConflictError, 410: GoneError}
    return kinds.get(status, ApiError)(status, reason, message)
