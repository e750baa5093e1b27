"""Settings of one operator process, read once from the environment, and the constants of its API.

Owns: every name and limit that is not part of a TokaDeployment. May not import anything of ours but `errors`.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from toka_operator.errors import SettingsError

GROUP = "toka.dev"
VERSION = "v1alpha1"
PLURAL = "tokadeployments"
KIND = "TokaDeployment"
API_VERSION = f"{GROUP}/{VERSION}"

FIELD_MANAGER = "toka-operator"
MANAGED_BY = "toka-operator"
REVISION_LABEL = f"{GROUP}/revision"
FINGERPRINT_ANNOTATION = f"{GROUP}/fingerprint"
"""On a ControllerRevision: the fingerprint of the specs that it was made for."""
SERVED_ANNOTATION = f"{GROUP}/served"
"""On a ControllerRevision that another one replaced: that a pod of it has served, so the history keeps it longest."""
SPEC_ANNOTATION = f"{GROUP}/spec"
"""On a ControllerRevision: the parts of the spec that it was made for, so that a user can go back to them."""
SERVICE_ANNOTATIONS_KEY = f"{GROUP}/service-annotations"
"""On the Service: the keys of the annotations that the spec asked for, so that a removed one is known to
be ours."""

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that the chart passes in. Seconds everywhere."""

    engine_image: str
    """Image of engines whose spec names none. Written into a revision when it is made, never changed in
    it."""
    namespace: str = "default"
    """The namespace of the Lease."""
    watch_namespaces: tuple[str, ...] = ()
    """Empty: the whole cluster."""
    lease_name: str = "toka-operator"
    """One for each release of the chart: operators that share one are replicas of each other."""
    allow_host_path: bool = False
    """Whether podTemplate may mount folders of the node."""
    reads_downloads: bool = False
    """Whether engines that load are asked by HTTP how far their download is."""
    makes_pod_monitors: bool = False
    """Whether PodMonitors are watched and made, where the cluster has them."""
    pod_monitor_labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of each PodMonitor, by which a Prometheus selects it."""
    makes_routes: bool = False
    """Whether InferencePools and HTTPRoutes are watched and made, where the cluster has them."""
    watches_nodes: bool = False
    """Whether nodes may be listed and watched, for those that are cordoned."""
    identity: str = ""
    num_workers: int = 8
    """At most half of them work on objects that came in bulk."""
    health_port: int = 8080
    log_level: str = "INFO"
    lease_duration_s: float = 10.0
    lease_renew_deadline_s: float = 7.0
    lease_retry_s: float = 2.0
    watch_timeout_s: int = 25
    """The API server ends each watch after so long, with a bookmark before. So a stream that is silent for longer is
    dead, however it died, and to go on from the last version costs one request."""
    taken_name_retry_s: float = 30.0
    """Seconds until a child's name that a foreign object holds is tried again: no watch of ours can see that it was
    freed."""
    absent_retry_s: float = 30.0
    """Seconds until a kind that the cluster does not have is looked for again."""

    def find_asking_namespace(self, has_canary: bool) -> str | None:
        """The namespace whose pods, the operator's, ask engines by HTTP; None if they do not. `has_canary`: of an
        object whose rollouts have canaries."""
        return self.namespace if self.reads_downloads or has_canary else None


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from TOKA_* variables. Raises SettingsError naming the first variable that is missing or
    invalid."""
    image = environ.get("TOKA_ENGINE_IMAGE", "")
    if not image:
        raise SettingsError("TOKA_ENGINE_IMAGE is not set: it names the image of engines whose spec names none")
    log_level = environ.get("TOKA_LOG_LEVEL", "INFO").upper()
    if log_level not in LOG_LEVELS:
        raise SettingsError(f"TOKA_LOG_LEVEL={log_level}: must be one of {', '.join(LOG_LEVELS)}")
    duration_s = _read_int(environ, "TOKA_LEASE_DURATION_SECONDS", 10, 3, 3600)
    deadline_s = _read_int(environ, "TOKA_LEASE_RENEW_DEADLINE_SECONDS", 7, 2, 3600)
    retry_s = _read_int(environ, "TOKA_LEASE_RETRY_SECONDS", 2, 1, 3600)
    if deadline_s >= duration_s:
        raise SettingsError(
            f"TOKA_LEASE_RENEW_DEADLINE_SECONDS={deadline_s}: must be less than TOKA_LEASE_DURATION_SECONDS="
            f"{duration_s}, or two operators could write at a time"
        )
    if retry_s >= deadline_s:
        raise SettingsError(
            f"TOKA_LEASE_RETRY_SECONDS={retry_s}: must be less than TOKA_LEASE_RENEW_DEADLINE_SECONDS={deadline_s}, "
            "or the Lease would be lost between two renewals"
        )
    namespaces = tuple(n.strip() for n in environ.get("TOKA_WATCH_NAMESPACES", "").split(",") if n.strip())
    return Settings(
        engine_image=image,
        namespace=environ.get("TOKA_NAMESPACE", "default"),
        watch_namespaces=namespaces,
        lease_name=environ.get("TOKA_LEASE_NAME") or "toka-operator",
        allow_host_path=_read_bool(environ, "TOKA_ALLOW_HOST_PATH"),
        reads_downloads=_read_bool(environ, "TOKA_READ_DOWNLOADS"),
        makes_pod_monitors=_read_bool(environ, "TOKA_POD_MONITORS"),
        pod_monitor_labels=_read_labels(environ, "TOKA_POD_MONITOR_LABELS"),
        makes_routes=_read_bool(environ, "TOKA_ROUTES"),
        watches_nodes=_read_bool(environ, "TOKA_WATCH_NODES"),
        identity=environ.get("TOKA_IDENTITY") or _make_identity(),
        num_workers=_read_int(environ, "TOKA_WORKERS", 8, 1, 64),
        health_port=_read_int(environ, "TOKA_HEALTH_PORT", 8080, 0, 65535),
        log_level=log_level,
        lease_duration_s=duration_s,
        lease_renew_deadline_s=deadline_s,
        lease_retry_s=retry_s,
        watch_timeout_s=_read_int(environ, "TOKA_WATCH_SECONDS", 25, 5, 290),
        taken_name_retry_s=_read_int(environ, "TOKA_TAKEN_NAME_RETRY_SECONDS", 30, 1, 3600),
        absent_retry_s=_read_int(environ, "TOKA_ABSENT_KIND_RETRY_SECONDS", 30, 1, 3600),
    )


def _make_identity() -> str:
    """Return a name for the Lease that no other operator has, one on the same host included: both would lead."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


def _read_int(environ: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError as error:
        raise SettingsError(f"{name}={text}: must be a whole number") from error
    if not low <= value <= high:
        raise SettingsError(f"{name}={text}: must be between {low} and {high}")
    return value


def _read_labels(environ: Mapping[str, str], name: str) -> dict[str, str]:
    """Labels as a=b,c=d."""
    text = environ.get(name, "")
    pairs = [pair.strip().partition("=") for pair in text.split(",") if pair.strip()]
    if any(not key or not is_pair for key, is_pair, _ in pairs):
        raise SettingsError(f"{name}={text}: must be labels as a=b,c=d")
    return {key: value for key, _, value in pairs}


def _read_bool(environ: Mapping[str, str], name: str) -> bool:
    text = environ.get(name) or "false"
    if text not in ("true", "false"):
        raise SettingsError(f"{name}={text}: must be true or false")
    return text == "true"
