"""Holds the watches' view of one TokaDeployment's children, as small immutable values.

Owns: reading pods, StatefulSets and EndpointSlices as the API server shows them. Pure. Everything later
decides on these values, so no other module knows the shape of a pod's status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from toka_operator.caches import cache_claim_name
from toka_operator.data import claim_name
from toka_operator.failures import Failure, find_failure, is_creating, is_on_lost_node
from toka_operator.fields import Json
from toka_operator.figures import Figures
from toka_operator.podspec import ENGINE_CONTAINER
from toka_operator.resources import CLAIM
from toka_operator.settings import KIND, MANAGED_BY, REVISION_LABEL
from toka_operator.sight import NOT_ALLOWED
from toka_operator.times import parse_time

STARTS_TOGETHER_S = 1.0
"""A kubelet writes a pod's start time and its first, unready, condition together; their seconds may differ by one."""


@dataclass(frozen=True, slots=True)
class Startup:
    """The stages of a pod until it was ready, in whole seconds: the pod's own times have no finer ones."""

    schedule_s: int
    """From its creation until a node was found."""
    start_s: int
    """From there until the engine's container ran: volumes, the pull of images, init containers."""
    load_s: int
    """From there until the pod was ready: what the engine loads and warms up."""


@dataclass(frozen=True, slots=True)
class Download:
    """The state of one pod's download, as its engine tells it."""

    num_bytes: int
    total_bytes: int
    bytes_per_s: int

    def __str__(self) -> str:
        unit, size = ("GB", 1e9) if self.total_bytes >= 1e8 else ("MB", 1e6)
        done, total = self.num_bytes / size, self.total_bytes / size
        return f"{done:.2f} of {total:.2f} {unit}, {self.bytes_per_s / 1e6:.0f} MB/s"


@dataclass(frozen=True, slots=True)
class PodView:
    """One engine pod. `ready_since`: since when (Unix time) it is, or is not, ready. `has_served`: it has been ready
    since it was made. `failure`: its latest, also when it runs again. `startup`: None unless it is ready and its times
    tell of its first start."""

    name: str
    uid: str
    revision: str
    ordinal: int
    is_ready: bool
    has_served: bool
    ready_since: float
    is_on_lost_node: bool
    is_in_endpoints: bool
    terminating_until: float | None
    failure: Failure | None
    startup: Startup | None
    node: str = ""
    """The node that it is bound to, if any."""
    scheduled_at: float = 0.0
    is_creating: bool = False
    """Bound to a node, where none of its containers began."""
    address: str = ""
    """Its IP address, once it has one."""
    loading_address: str = ""
    """The same, while its engine runs and is not ready."""
    restarts: int = 0
    """The number of times that its engine was started anew."""
    created_at: float = 0.0

    @property
    def is_terminating(self) -> bool:
        return self.terminating_until is not None

    def is_available(self, now: float, min_ready_s: float) -> bool:
        """Ready for min_ready_s, and seen in the Service's endpoints, so that clients really reach it."""
        return (
            self.is_ready and not self.is_terminating and self.is_in_endpoints and now >= self.ready_since + min_ready_s
        )

    def is_stuck(self, now: float, stuck_s: float) -> bool:
        """Whether it outlived its grace period by so much that it sits on a dead node, and is not waited for."""
        return self.terminating_until is not None and now > self.terminating_until + stuck_s

    @property
    def is_failing(self) -> bool:
        """Not ready, for a reason that waiting alone does not mend."""
        return self.failure is not None and self.failure.is_current and not self.is_ready and not self.is_terminating


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything seen of one TokaDeployment's children. `children` and `sets` hold only objects that it
    owns."""

    children: Mapping[tuple[str, str], Json]
    """(kind, name) -> live object, of every kind but pods and endpoints."""
    pods: tuple[PodView, ...]
    taken_names: frozenset[tuple[str, str]]
    """Names of children that objects of other owners hold."""
    other_pods: frozenset[str] = frozenset()
    """Names of pods labelled as ours that no StatefulSet of ours controls: a new pod cannot have such a name."""
    missing_pods: tuple[Failure, ...] = ()
    """Why StatefulSets have fewer pods than they ask for."""
    sights: Mapping[str, str] = field(default_factory=dict)
    """Kind that the cluster need not have -> how it is seen (`sight`)."""
    downloads: Mapping[str, Download] = field(default_factory=dict)
    """By name of a pod of the current revision that downloads the model."""
    figures: Mapping[str, Figures] = field(default_factory=dict)
    """By uid of a canary or an old pod that it is compared with: what its engine has counted."""
    complete_revision: str = ""
    """The last revision of which every wanted pod was available."""
    cordoned: frozenset[str] | None = None
    """Names of the nodes that are cordoned; None: the operator cannot see nodes."""

    def see(self, kind: str) -> str:
        """Whether a kind that the cluster need not have can be seen, and so made."""
        return self.sights.get(kind, NOT_ALLOWED)

    def of_kind(self, kind: str) -> list[Json]:
        return [child for (k, _), child in sorted(self.children.items()) if k == kind]


def find_engine_port(stateful_set: Json) -> int:
    """Return the port on which the engines of a revision listen, which another revision may change."""
    containers = stateful_set["spec"]["template"]["spec"]["containers"]
    engine: Json = next((each for each in containers if each["name"] == ENGINE_CONTAINER), {})
    return next((int(each["containerPort"]) for each in engine.get("ports") or []), 0)


def is_owned_by(child: Json, uid: str) -> bool:
    """Whether the object with this uid is the controller of `child`."""
    owners = child["metadata"].get("ownerReferences") or []
    return any(owner.get("controller") and owner.get("uid") == uid for owner in owners)


def is_orphaned(child: Json) -> bool:
    """Whether nothing owns `child`."""
    return not child["metadata"].get("ownerReferences")


def is_kept_claim(child: Json, name: str) -> bool:
    """Whether `child` is a claim of a TokaDeployment `name` that stays when that goes: one that an operator made and
    nobody controls. A TokaDeployment of the same name takes it over."""
    metadata = child["metadata"]
    labels = metadata.get("labels") or {}
    is_ours = labels.get("app.kubernetes.io/managed-by") == MANAGED_BY and metadata["name"] in (
        claim_name(name),
        cache_claim_name(name),
    )
    owners = metadata.get("ownerReferences") or []
    return child.get("kind") == CLAIM and is_ours and not any(owner.get("controller") for owner in owners)


def is_adoptable(pod: Json, name: str) -> bool:
    """Whether a pod without an owner is one of the TokaDeployment `name`'s: a StatefulSet of ours takes it over."""
    metadata = pod["metadata"]
    revision = (metadata.get("labels") or {}).get(REVISION_LABEL)
    return is_orphaned(pod) and metadata["name"].rpartition("-")[0] == f"{name}-{revision}"


def is_predecessors(child: Json, name: str, uid: str) -> bool:
    """Whether the controller of `child` is a TokaDeployment of the same name as ours, but another."""
    owners = child["metadata"].get("ownerReferences") or []
    return any(
        o.get("controller") and (o.get("kind"), o.get("name")) == (KIND, name) and o["uid"] != uid for o in owners
    )


def ready_addresses(slices: Iterable[Json]) -> frozenset[str]:
    """Names of the pods that the Service sends requests to."""
    return frozenset(
        endpoint["targetRef"]["name"]
        for endpoint_slice in slices
        for endpoint in endpoint_slice.get("endpoints") or []
        if (endpoint.get("conditions") or {}).get("ready") is not False and endpoint.get("targetRef")
    )


def view_pod(pod: Json, endpoints: frozenset[str]) -> PodView:
    """The view of one engine pod; `endpoints` are the pod names that the Service sends requests to."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    ready = conditions.get("Ready", {})
    ordinal = metadata["name"].rsplit("-", 1)[-1]
    deletion = metadata.get("deletionTimestamp")
    return PodView(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        revision=(metadata.get("labels") or {}).get(REVISION_LABEL, ""),
        ordinal=int(ordinal) if ordinal.isdigit() else 0,
        is_ready=ready.get("status") == "True",
        has_served=has_been_ready(status, ready),
        ready_since=parse_time(ready.get("lastTransitionTime")),
        is_on_lost_node=is_on_lost_node(conditions),
        is_in_endpoints=metadata["name"] in endpoints,
        terminating_until=parse_time(deletion) if deletion else None,
        failure=find_failure(pod),
        startup=find_startup(metadata, status, conditions),
        node=(pod.get("spec") or {}).get("nodeName") or "",
        scheduled_at=parse_time(conditions.get("PodScheduled", {}).get("lastTransitionTime")),
        is_creating=is_creating(pod),
        address=str(status.get("podIP") or ""),
        loading_address=find_loading_address(status, ready),
        restarts=count_restarts(status),
        created_at=parse_time(metadata.get("creationTimestamp")),
    )


def find_loading_address(status: Json, ready: Json) -> str:
    """Return the address of a pod whose engine runs and is not ready."""
    states = [s.get("state") or {} for s in status.get("containerStatuses") or [] if s.get("name") == ENGINE_CONTAINER]
    is_loading = ready.get("status") != "True" and any("running" in state for state in states)
    return str(status.get("podIP") or "") if is_loading else ""


def count_restarts(status: Json) -> int:
    """Return how often a pod's engine was started anew."""
    found = (s for s in status.get("containerStatuses") or [] if s.get("name") == ENGINE_CONTAINER)
    return sum(int(s.get("restartCount") or 0) for s in found)


def has_been_ready(status: Json, ready: Json) -> bool:
    """Whether a pod is ready or was once: only then its condition changed after the kubelet had taken the pod on."""
    if ready.get("status") == "True":
        return True
    changed, started = parse_time(ready.get("lastTransitionTime")), parse_time(status.get("startTime"))
    return started > 0.0 and changed > started + STARTS_TOGETHER_S


def find_startup(metadata: Json, status: Json, conditions: Mapping[str, Json]) -> Startup | None:
    """Return how a ready pod came up. None if its engine was restarted, or if its times are missing or go backwards (a
    node's clock may differ from the API server's): then they do not tell."""
    ready, scheduled = conditions.get("Ready", {}), conditions.get("PodScheduled", {})
    engines = (s for s in status.get("containerStatuses") or [] if s.get("name") == ENGINE_CONTAINER)
    engine: Json = next(engines, {})
    running = (engine.get("state") or {}).get("running") or {}
    is_told = ready.get("status") == scheduled.get("status") == "True" and not engine.get("restartCount")
    stamps = (metadata.get("creationTimestamp"), scheduled.get("lastTransitionTime"), running.get("startedAt"))
    times = [parse_time(stamp) for stamp in (*stamps, ready.get("lastTransitionTime"))]
    if not is_told or 0.0 in times or times != sorted(times):
        return None
    created, bound, started, up = times
    return Startup(int(bound - created), int(started - bound), int(up - started))
