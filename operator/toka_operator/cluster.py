"""The API server, as this program uses it: list, watch, create, server-side apply, merge patch, delete,
status.

Owns: every request but kopf's own, paths, timeouts and the mapping of HTTP errors to our tree. The only
user of the kubernetes client. Decides nothing and retries nothing; objects are plain dicts. Safe to use
from several threads.
"""

from __future__ import annotations

import json
import os
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
)
from toka_operator.fields import Json
from toka_operator.settings import FIELD_MANAGER, GROUP, PLURAL, VERSION

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
WATCH_SERVER_TIMEOUT_S = 270
WATCH_CLIENT_TIMEOUT_S = 300.0
LIST_PAGE = 500

_PATHS = {
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "Service": ("api/v1", "services"),
    "Pod": ("api/v1", "pods"),
    "Event": ("api/v1", "events"),
    "StatefulSet": ("apis/apps/v1", "statefulsets"),
    "ControllerRevision": ("apis/apps/v1", "controllerrevisions"),
    "PodDisruptionBudget": ("apis/policy/v1", "poddisruptionbudgets"),
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
    """A connection to one API server. `may_write` is asked before each write but those on Leases."""

    def __init__(self, api_client: Any, may_write: Callable[[], bool]) -> None:
        self._api = api_client
        self._may_write = may_write

    def list_all(self, kind: str, namespace: str | None, selector: str = "") -> Page:
        """Every object of a kind, page by page. `namespace` None: the whole cluster."""
        query: list[tuple[str, Any]] = [("limit", LIST_PAGE)]
        if selector:
            query.append(("labelSelector", selector))
        items: list[Json] = []
        token = ""
        while True:
            page = self._request("GET", _path(kind, namespace), [*query, ("continue", token)] if token else query)
            items += page.get("items") or []
            token = page["metadata"].get("continue", "")
            if not token:
                return Page(items, page["metadata"]["resourceVersion"])

    def list_identities(self, kind: str, namespace: str | None) -> dict[tuple[str, str], str]:
        """(namespace, name) -> uid of every object of a kind: a list of names, without the objects."""
        accept = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
        page = self._request("GET", _path(kind, namespace), [("resourceVersion", "0")], accept=accept)
        metadata = (item["metadata"] for item in page.get("items") or [])
        return {(m["namespace"], m["name"]): m["uid"] for m in metadata}

    def watch(self, kind: str, namespace: str | None, selector: str, resource_version: str) -> Iterator[Json]:
        """Watch events until the server ends the stream. Raises GoneError when the version is too old."""
        query = [
            ("watch", "true"),
            ("labelSelector", selector),
            ("resourceVersion", resource_version),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", WATCH_SERVER_TIMEOUT_S),
        ]
        timeout = (CONNECT_TIMEOUT_S, WATCH_CLIENT_TIMEOUT_S)
        response = self._send("GET", _path(kind, namespace), query, timeout=timeout)
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

    def create(self, manifest: Json) -> Json:
        """Raises ConflictError if the name is taken, by whomever."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        return self._write("POST", path, manifest, _JSON)

    def replace(self, manifest: Json) -> Json:
        """Whole-object update; ConflictError if its resourceVersion is not the newest."""
        metadata = manifest["metadata"]
        return self._write("PUT", _path(manifest["kind"], metadata["namespace"], metadata["name"]), manifest, _JSON)

    def apply_status(self, manifest: Json, uid: str) -> Json:
        """Server-side apply of the status block; ConflictError if the object is not the one with this uid."""
        metadata = manifest["metadata"]
        path = _path(manifest["kind"], metadata["namespace"], metadata["name"]) + "/status"
        return self._write("PATCH", path, {**manifest, "metadata": {**metadata, "uid": uid}}, _APPLY)

    def merge(self, kind: str, namespace: str, name: str, uid: str, patch: Json) -> Json:
        """JSON merge patch of an existing object; ConflictError if that is not the one with this uid."""
        body = {**patch, "metadata": {**patch.get("metadata", {}), "uid": uid}}
        return self._write("PATCH", _path(kind, namespace, name), body, _MERGE)

    def delete(self, kind: str, namespace: str, name: str, uid: str, grace_s: int | None = None) -> None:
        """Deletes in the background; ConflictError if the object is not the one with this uid.

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
        self._write("DELETE", _path(kind, namespace, name), body, _JSON)

    def _write(self, method: str, path: str, body: Json, content_type: str) -> Json:
        if "/leases" not in path and not self._may_write():
            raise NotLeaderError(f"{method} {path}: the lease is not held")
        query: list[tuple[str, Any]] = [] if method == "DELETE" else [("fieldManager", FIELD_MANAGER)]
        if content_type == _APPLY:
            query.append(("force", "true"))
        return self._request(method, path, query, body, content_type)

    def _request(
        self,
        method: str,
        path: str,
        query: list[tuple[str, Any]],
        body: Json | None = None,
        content_type: str = _JSON,
        accept: str = "application/json",
    ) -> Json:
        timeout = (CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S)
        response = self._send(method, path, query, body, content_type, accept, timeout)
        try:
            data = response.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise TransientError(f"{method} {path}: {error}") from error
        finally:
            response.release_conn()
        if response.status >= 400:
            raise _to_error(response.status, data, response.headers)
        return _parse_json(data)

    def _send(
        self,
        method: str,
        path: str,
        query: list[tuple[str, Any]],
        body: Json | None = None,
        content_type: str = _JSON,
        accept: str = "application/json",
        timeout: tuple[float, float] = (CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S),
    ) -> Any:
        verb, url, headers, *_ = self._api.param_serialize(
            method=method,
            resource_path=path,
            query_params=query,
            header_params={"Accept": accept, "Content-Type": content_type},
            auth_settings=["BearerToken"],
        )
        connect_s, read_s = timeout
        try:
            return self._api.rest_client.pool_manager.request(
                verb,
                url,
                body=None if body is None else encode_canonically(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=connect_s, read=read_s),
                preload_content=False,
            )
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


def connect(num_connections: int, may_write: Callable[[], bool]) -> Cluster:
    """A Cluster from the pod's service account, else from KUBECONFIG."""
    configuration = client.Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        config.load_incluster_config(client_configuration=configuration)
    else:
        path = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
        config.load_kube_config(config_file=path, client_configuration=configuration)
    configuration.connection_pool_maxsize = num_connections
    configuration.retries = False
    configuration.keep_alive = True
    return Cluster(client.ApiClient(configuration), may_write)


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
            if event["type"] == "ERROR":
                status = event["object"]
                raise _to_error(int(status.get("code", 500)), json.dumps(status).encode(), {})
            yield event


def _parse_json(data: bytes) -> Json:
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise TransientError("the answer is not JSON") from error
    if not isinstance(parsed, dict):
        raise TransientError("the answer is not a JSON object")
    return parsed


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
