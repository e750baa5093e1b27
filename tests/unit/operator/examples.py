"""Objects as the API server would show them, for tests of the pure modules."""

from __future__ import annotations

from typing import Any

from toka_operator.observed import Observed, PodView, view_pod
from toka_operator.plan import Plan, make_plan
from toka_operator.resources import Owner
from toka_operator.settings import Settings
from toka_operator.spec import TokaDeploymentSpec, parse

Json = dict[str, Any]
OWNER = Owner("apps", "chat", "uid-1", 1)
NOW = 1_800_000_000.0
IMAGE = "engine:1"


def body(**spec: Any) -> Json:
    """A TokaDeployment; `spec` entries are added to a minimal one."""
    full = {"model": {"source": "builtin://smollm2"}, **spec}
    return {"metadata": {"name": "chat", "namespace": "apps", "uid": "uid-1", "generation": 1}, "spec": full}


def valid(**spec: Any) -> TokaDeploymentSpec:
    parsed = parse(body(**spec))
    assert isinstance(parsed, TokaDeploymentSpec), parsed
    return parsed


def nothing() -> Observed:
    return Observed({}, (), frozenset())


def plan_for(spec: TokaDeploymentSpec, observed: Observed | None = None, image: str = IMAGE) -> Plan:
    return make_plan(OWNER, spec, observed or nothing(), Settings(engine_image=image), NOW)


def child(plan: Plan, kind: str) -> Json:
    """The only child of a kind in a plan."""
    (found,) = [c for c in plan.desired if c["kind"] == kind]
    return found


def live(manifest: Json, uid: str = "") -> Json:
    """A manifest as it would be seen once written."""
    name = manifest["metadata"]["name"]
    metadata = {**manifest["metadata"], "uid": uid or f"uid-{manifest['kind']}-{name}", "generation": 1}
    return {**manifest, "metadata": metadata}


def seen(plan: Plan, pods: tuple[PodView, ...] = ()) -> Observed:
    """The children as observed once a plan was written."""
    children = {(c["kind"], c["metadata"]["name"]): live(c) for c in plan.desired}
    return Observed(children, pods, frozenset())


def pod(revision: str, ordinal: int = 0, status: Json | None = None, is_available: bool = False) -> PodView:
    """One pod of OWNER. `is_available`: ready for an hour and in the endpoints."""
    name = f"chat-{revision}-{ordinal}"
    since = "2027-01-15T07:00:00Z"
    ready = {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": since}]}
    raw = {
        "metadata": {"name": name, "labels": {"toka.dev/revision": revision}},
        "status": ready if is_available else (status or {}),
    }
    return view_pod(raw, frozenset([name] if is_available else []))


def engine_status(**status: Any) -> Json:
    """A pod's status with one container status, of the engine."""
    return {"containerStatuses": [{"name": "engine", "restartCount": 0, **status}]}
