"""The plan: which children there should be, and which should go.

Owns: turning (spec, observed, now) into manifests and deletions. Pure: no reads, writes or clock.
`reconcile` compares the manifests with what is there and writes the differences; running the same plan
twice writes nothing the second time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from toka_operator.failures import NOT_READY
from toka_operator.fields import Json
from toka_operator.moves import find_displaced, find_hold_end, holds_only_pod
from toka_operator.observed import Observed, PodView, find_engine_port
from toka_operator.podspec import render_pod_template
from toka_operator.resources import (
    CONTROLLER_REVISION,
    HTTP_ROUTE,
    INFERENCE_POOL,
    NETWORK_POLICY,
    OPTIONAL_KINDS,
    POD_MONITOR,
    STATEFUL_SET,
    Owner,
    pod_labels,
    render_autoscaler,
    render_cache_claim,
    render_claim,
    render_disruption_budget,
    render_http_route,
    render_inference_pool,
    render_network_policy,
    render_peers_service,
    render_pod_monitor,
    render_revision,
    render_service,
    render_service_account,
    render_stateful_set,
    set_name,
)
from toka_operator.revisions import by_revision
from toka_operator.rollout import Budgets, RevisionPods, Window, decide_windows, find_moves
from toka_operator.settings import SERVED_ANNOTATION, SPEC_ANNOTATION, Settings
from toka_operator.spec import TokaDeploymentSpec

MIN_RESTARTS_OF_UNRECOVERABLE = 3
"""A container that failed this often is not taken to come back by itself."""
UNRECOVERABLE_AFTER_S = 60.0
"""Nor is a pod that has not been ready for this long."""
MAX_KEPT_SPEC_BYTES = 100_000
"""Annotations of one object may have 262,144 bytes, all together."""
NODE_LOST_FOR_S = 10.0
"""A pod that was told to go from a lost node is deleted for good this long after the node was lost."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The writes of one pass. `desired` is in the order of writing; `deletions` are (kind, name, uid)."""

    desired: tuple[Json, ...]
    deletions: tuple[tuple[str, str, str], ...]
    dead_pods: tuple[tuple[str, str], ...]
    """(name, uid) of pods to be deleted without waiting for a kubelet, which does not answer."""
    moved_pods: tuple[tuple[str, str], ...]
    """(name, uid) of pods to be deleted because their node is cordoned, and others serve in their place."""
    revisions: Mapping[str, RevisionPods]
    """The revisions that have a StatefulSet, or lost it without their pods, as seen, oldest first."""
    targets: Mapping[str, Window]
    templates: Mapping[str, Json]
    requeue_s: float | None


def make_plan(
    owner: Owner,
    spec: TokaDeploymentSpec,
    observed: Observed,
    settings: Settings,
    now: float,
    new_limit: int | None = None,
) -> Plan:
    """The one next step towards `spec`. `now` is a Unix time; `requeue_s` says when time alone changes the
    answer. `new_limit`: the pods that a new revision may have, because of its canary."""
    sets = by_revision(owner, observed.of_kind(STATEFUL_SET))
    stored = by_revision(owner, observed.of_kind(CONTROLLER_REVISION))
    numbers = {revision: int(child.get("revision", 0)) for revision, child in stored.items()}
    windows = {name: read_window(live) for name, live in sets.items()} | _find_lost_windows(
        spec, sets, stored, observed
    )
    by_age = sorted(windows, key=lambda revision: (numbers.get(revision, 0), revision))
    revisions = {name: _view_revision(owner, name, windows[name], spec, observed, now) for name in by_age}
    budgets = find_budgets(spec, observed, now, new_limit)
    unmade = RevisionPods(leaving=_find_other_pods(set_name(owner.name, spec.revision), observed))
    targets = decide_windows(budgets, spec.revision, revisions, unmade)
    finished = _find_finished_sets(spec, sets, targets, observed)
    templates = _find_templates(owner, spec, sets, stored, targets, settings.engine_image)
    replaced = {name for name, pods in revisions.items() if name != spec.revision and pods.served | pods.available}
    kept_specs = _find_kept_specs(spec, stored)
    optional = _render_optional_children(owner, spec, observed, templates, settings, now)
    desired = _render_children(owner, spec, templates, numbers, targets, finished, replaced, kept_specs)
    first = [child for child in optional if child["kind"] == NETWORK_POLICY]  # before the pods that it shuts off
    desired = [*first, *desired, *(child for child in optional if child not in first)]
    return Plan(
        desired=tuple(m for m in desired if (m["kind"], m["metadata"]["name"]) not in observed.taken_names),
        deletions=(*finished.values(), *_find_surplus(spec, optional, observed, stored, sets)),
        dead_pods=tuple((pod.name, pod.uid) for pod in observed.pods if _is_dead(pod, spec, now)),
        moved_pods=_find_moved(observed, find_moves(budgets, spec.revision, revisions, targets)),
        revisions=revisions,
        targets=targets,
        templates=templates,
        requeue_s=_next_moment(spec, observed, now),
    )


def find_budgets(spec: TokaDeploymentSpec, observed: Observed, now: float, new_limit: int | None = None) -> Budgets:
    """The pods more and fewer than desired that there may be now."""
    rollout = spec.rollout
    fallback = find_surge_fallback(spec, observed)
    is_in_place = fallback is not None and now >= fallback
    ends_old_first = rollout.strategy == "Recreate"
    return Budgets(
        num_desired=spec.num_wanted,
        max_surge=0 if is_in_place else rollout.max_surge,
        max_unavailable=spec.num_wanted if ends_old_first else max(int(is_in_place), rollout.max_unavailable),
        is_paused=rollout.paused,
        keeps_ordinals=spec.data is not None,
        ends_old_first=ends_old_first,
        new_limit=new_limit,
    )


def find_surge_fallback(spec: TokaDeploymentSpec, observed: Observed) -> float | None:
    """The Unix time from which an old pod goes first, because there is no room for one more; None if nobody asked for
    that, or there is room."""
    if spec.rollout.surge_fallback_s is None or all(pod.revision == spec.revision for pod in observed.pods):
        return None
    failures = (pod.failure for pod in observed.pods if pod.revision == spec.revision and pod.is_failing)
    since = [failure.since for failure in failures if failure is not None and failure.reason == "Unschedulable"]
    return min(since) + spec.rollout.surge_fallback_s if since else None


def read_window(live: Json) -> Window:
    """The ordinals that a StatefulSet asks for."""
    spec = live["spec"]
    return Window(int((spec.get("ordinals") or {}).get("start", 0)), int(spec.get("replicas", 1)))


def _find_lost_windows(
    spec: TokaDeploymentSpec, sets: Mapping[str, Json], stored: Mapping[str, Json], observed: Observed
) -> dict[str, Window]:
    """The ordinals of pods whose StatefulSet was deleted without them, by revision. A new set takes them over."""
    found: dict[str, Window] = {}
    for revision in stored.keys() | {spec.revision}:
        ordinals = [p.ordinal for p in observed.pods if p.revision == revision and not p.is_terminating]
        if ordinals and revision not in sets:
            found[revision] = Window(min(ordinals), max(ordinals) - min(ordinals) + 1)
    return found


def _view_revision(
    owner: Owner, revision: str, window: Window, spec: TokaDeploymentSpec, observed: Observed, now: float
) -> RevisionPods:
    pods = [pod for pod in observed.pods if pod.revision == revision]
    leaving = frozenset(pod.ordinal for pod in pods if pod.is_terminating)
    displaced = frozenset(pod.ordinal for pod in find_displaced(spec, observed) if pod.revision == revision)
    seen = RevisionPods(
        window=window,
        available=frozenset(p.ordinal for p in pods if p.is_available(now, spec.rollout.min_ready_s)),
        served=frozenset(p.ordinal for p in pods if p.has_served and not p.is_terminating),
        displaced=displaced,
        unrecoverable=frozenset(p.ordinal for p in pods if _is_unrecoverable(p, now)),
        leaving=leaving | _find_other_pods(set_name(owner.name, revision), observed),
        keeps_ordinals=spec.data is not None,
    )
    outside = (pod for pod in pods if pod.ordinal not in seen.trim())
    return replace(seen, num_draining=sum(not pod.is_stuck(now, spec.rollout.stuck_s) for pod in outside))


def _find_other_pods(set_name: str, observed: Observed) -> frozenset[int]:
    """Ordinals of a StatefulSet whose pods cannot be made, because another's pod has the name."""
    prefix = set_name + "-"
    ordinals = (name.removeprefix(prefix) for name in observed.other_pods if name.startswith(prefix))
    return frozenset(int(ordinal) for ordinal in ordinals if ordinal.isdigit())


def _is_unrecoverable(pod: PodView, now: float) -> bool:
    """Failing before its first start or again and again, or not ready for long, whatever the reason."""
    if pod.is_ready or pod.is_terminating:
        return False
    if pod.ready_since and now >= pod.ready_since + UNRECOVERABLE_AFTER_S:
        return True
    if pod.failure is None or not pod.is_failing or pod.failure.reason == NOT_READY:
        return False
    return pod.failure.exit_code is None or pod.failure.restarts >= MIN_RESTARTS_OF_UNRECOVERABLE


def _find_moved(observed: Observed, moves: list[tuple[str, int]]) -> tuple[tuple[str, str], ...]:
    pods = (pod for pod in observed.pods if (pod.revision, pod.ordinal) in moves and not pod.is_terminating)
    return tuple((pod.name, pod.uid) for pod in pods)


def _is_dead(pod: PodView, spec: TokaDeploymentSpec, now: float) -> bool:
    """Told to go, and nobody will end it: its node is lost, or its grace period has long been over."""
    is_lost = pod.is_on_lost_node and now > pod.ready_since + NODE_LOST_FOR_S
    return pod.is_terminating and (is_lost or pod.is_stuck(now, spec.rollout.stuck_s))


def _find_finished_sets(
    spec: TokaDeploymentSpec, sets: Mapping[str, Json], targets: Mapping[str, Window], observed: Observed
) -> dict[str, tuple[str, str, str]]:
    """Old revisions' StatefulSets with no pod asked for and none left."""
    with_pods = {pod.revision for pod in observed.pods}
    return {
        revision: (STATEFUL_SET, live["metadata"]["name"], live["metadata"]["uid"])
        for revision, live in sets.items()
        if revision != spec.revision
        and revision in targets
        and targets[revision].replicas == 0
        and revision not in with_pods
        and live["spec"].get("replicas") == 0
        and live.get("status", {}).get("replicas", 0) == 0
        and live.get("status", {}).get("observedGeneration", 0) >= live["metadata"].get("generation", 0)
    }


def _find_templates(
    owner: Owner,
    spec: TokaDeploymentSpec,
    sets: Mapping[str, Json],
    stored: Mapping[str, Json],
    targets: Mapping[str, Window],
    default_image: str,
) -> dict[str, Json]:
    """Each live revision's pod template: the stored one, else its StatefulSet's; rendered only for a new
    revision."""
    templates: dict[str, Json] = {}
    for revision in targets:
        if revision in stored:
            templates[revision] = stored[revision]["data"]["template"]
        elif revision in sets:
            template: Json = sets[revision]["spec"]["template"]
            metadata = {k: v for k, v in template["metadata"].items() if v is not None}
            templates[revision] = {**template, "metadata": metadata}
        else:
            labels = pod_labels(owner.name, revision)
            templates[revision] = render_pod_template(spec, default_image, labels, owner.name)
    return templates


def _render_children(
    owner: Owner,
    spec: TokaDeploymentSpec,
    templates: Mapping[str, Json],
    numbers: Mapping[str, int],
    targets: Mapping[str, Window],
    finished: Mapping[str, object],
    replaced: Set[str],
    kept_specs: Mapping[str, str | None],
) -> list[Json]:
    """Every child but the disruption budget, in the order of writing. `replaced`: old revisions whose pods have
    served."""
    children = [render_service_account(owner), render_service(owner, spec)]
    if spec.data is not None:
        children += [render_claim(owner, spec.data), render_peers_service(owner, spec)]
    if cache_claim := render_cache_claim(owner, spec):
        children.append(cache_claim)
    newest = max(numbers.values(), default=0)
    order = sorted(set(targets) - set(finished), key=lambda r: (r == spec.revision, numbers.get(r, 0), r))
    for revision in order:
        number = numbers.get(revision, newest + 1)
        if revision == spec.revision and any(n >= number for r, n in numbers.items() if r != revision):
            number = newest + 1
        fingerprint = spec.fingerprint if revision == spec.revision else None
        kept_spec = kept_specs.get(revision)
        children.append(
            render_revision(owner, revision, templates[revision], number, fingerprint, revision in replaced, kept_spec)
        )
        window = targets[revision]
        children.append(render_stateful_set(owner, revision, templates[revision], window.replicas, window.start))
    return children


def _render_optional_children(
    owner: Owner,
    spec: TokaDeploymentSpec,
    observed: Observed,
    templates: Mapping[str, Json],
    settings: Settings,
    now: float,
) -> list[Json]:
    """Children of kinds that not every spec asks for."""
    port = _find_pool_port(spec, observed, templates)
    pool = render_inference_pool(owner, spec, observed.see(INFERENCE_POOL), port)
    # One that is not there yet, or is somebody else's, gets no requests.
    has_pool = pool is not None and (INFERENCE_POOL, owner.name) in observed.children
    found = [
        render_network_policy(
            owner, spec, templates.values(), settings.find_asking_namespace(spec.rollout.canary_s > 0)
        ),
        render_disruption_budget(owner, spec, holds_only_pod(spec, observed, now)),
        render_autoscaler(owner, spec),
        render_pod_monitor(owner, spec, observed.see(POD_MONITOR), settings.pod_monitor_labels),
        pool,
        render_http_route(owner, spec, observed.see(HTTP_ROUTE), has_pool),
    ]
    return [child for child in found if child is not None]


def _find_pool_port(spec: TokaDeploymentSpec, observed: Observed, templates: Mapping[str, Json]) -> int:
    """The port on which most ready pods listen, because an InferencePool knows one; the spec's, if none is ready."""
    if spec.routing.picker is None:
        return spec.engine.port  # nobody asks
    revisions = (pod.revision for pod in observed.pods if pod.is_ready and not pod.is_terminating)
    ports = Counter(
        find_engine_port({"spec": {"template": templates[each]}}) for each in revisions if each in templates
    )
    return max(ports, key=lambda port: (ports[port], port == spec.engine.port), default=spec.engine.port)


def _find_kept_specs(spec: TokaDeploymentSpec, stored: Mapping[str, Json]) -> dict[str, str | None]:
    """The parts of the spec that each revision keeps: as they are stored, and of a new revision as they are now."""
    annotations = {revision: child["metadata"].get("annotations") or {} for revision, child in stored.items()}
    kept = {revision: found.get(SPEC_ANNOTATION) for revision, found in annotations.items()}
    return {spec.revision: describe_pod_fields(spec), **kept}


def describe_pod_fields(spec: TokaDeploymentSpec) -> str | None:
    """The text that a new revision keeps of the spec; None if it is too long for an annotation."""
    text = json.dumps(spec.pod_fields, sort_keys=True, separators=(",", ":"))
    return text if len(text.encode()) <= MAX_KEPT_SPEC_BYTES else None


def _find_surplus(
    spec: TokaDeploymentSpec,
    optional: list[Json],
    observed: Observed,
    stored: Mapping[str, Json],
    sets: Mapping[str, Json],
) -> list[tuple[str, str, str]]:
    """Optional children that are no longer desired, and revisions beyond the history's limit: those that never served
    go first, so that a few edits in a row do not leave out the last one that did. The last complete one stays."""
    wanted = {(child["kind"], child["metadata"]["name"]) for child in optional}
    kinds = OPTIONAL_KINDS
    surplus = [child for key, child in sorted(observed.children.items()) if key[0] in kinds and key not in wanted]
    kept = {spec.revision, observed.complete_revision, *sets}
    old = [child for revision, child in stored.items() if revision not in kept]
    old.sort(key=lambda child: (not _has_served(child), -int(child.get("revision", 0))))
    surplus += old[spec.rollout.revision_history_limit :]
    return [(c["kind"], c["metadata"]["name"], c["metadata"]["uid"]) for c in surplus]


def _has_served(stored: Json) -> bool:
    return (stored["metadata"].get("annotations") or {}).get(SERVED_ANNOTATION) == "true"


def _next_moment(spec: TokaDeploymentSpec, observed: Observed, now: float) -> float | None:
    """Seconds until a pod has been ready for long enough, or is given up as unrecoverable or dead, or no longer holds
    up a drain, or has waited for room for too long."""
    hold_end = find_hold_end(spec, observed, now)
    moments = [moment for moment in (hold_end, find_surge_fallback(spec, observed)) if moment is not None]
    for pod in observed.pods:
        if pod.terminating_until is not None:
            moments.append(pod.terminating_until + spec.rollout.stuck_s)
            if pod.is_on_lost_node:
                moments.append(pod.ready_since + NODE_LOST_FOR_S)
        elif pod.is_ready:
            moments.append(pod.ready_since + spec.rollout.min_ready_s)
        elif pod.revision != spec.revision and pod.ready_since:
            moments.append(pod.ready_since + UNRECOVERABLE_AFTER_S)
    return min((moment - now + 0.01 for moment in moments if moment >= now), default=None)
