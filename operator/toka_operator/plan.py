"""The plan: which children there should be, and which should go.

Owns: turning (spec, observed, now) into manifests and deletions. Pure: no reads, writes or clock.
`reconcile` compares the manifests with what is there and writes the differences; running the same plan
twice writes nothing the second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toka_operator.fields import Json
from toka_operator.observed import Observed, PodView
from toka_operator.podspec import render_pod_template
from toka_operator.resources import (
    CONTROLLER_REVISION,
    POD_DISRUPTION_BUDGET,
    STATEFUL_SET,
    Owner,
    pod_labels,
    render_disruption_budget,
    render_revision,
    render_service,
    render_service_account,
    render_stateful_set,
)
from toka_operator.rollout import Budgets, RevisionPods, decide_replicas
from toka_operator.settings import REVISION_LABEL
from toka_operator.spec import TokaDeploymentSpec

MIN_RESTARTS_OF_HOPELESS = 3
"""A container that failed this often is not taken to come back by itself."""
HOPELESS_AFTER_S = 60.0
"""Nor is an old pod that has not been ready for so long, say on a dead node."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write. `desired` is in the order of writing; `deletions` are (kind, name, uid)."""

    desired: tuple[Json, ...]
    deletions: tuple[tuple[str, str, str], ...]
    revisions: Mapping[str, RevisionPods]
    """The revisions with a StatefulSet, as seen."""
    targets: Mapping[str, int]
    templates: Mapping[str, Json]
    requeue_s: float | None


def make_plan(owner: Owner, spec: TokaDeploymentSpec, observed: Observed, default_image: str, now: float) -> Plan:
    """The one next step towards `spec`. `now` is a Unix time; `requeue_s` says when time alone changes the
    answer."""
    sets = _by_revision(observed.of_kind(STATEFUL_SET))
    stored = _by_revision(observed.of_kind(CONTROLLER_REVISION))
    revisions = {name: _view_revision(name, live, spec, observed, now) for name, live in sets.items()}
    budgets = Budgets(
        num_wanted=spec.num_wanted,
        max_surge=spec.rollout.max_surge,
        max_unavailable=spec.rollout.max_unavailable,
        is_paused=spec.rollout.paused,
    )
    targets = decide_replicas(budgets, spec.revision, revisions)
    finished = _find_finished_sets(spec, sets, targets, observed)
    templates = _find_templates(owner, spec, sets, stored, targets, default_image)
    desired = _render_children(owner, spec, templates, stored, targets, finished)
    return Plan(
        desired=tuple(m for m in desired if (m["kind"], m["metadata"]["name"]) not in observed.strangers),
        deletions=(*finished.values(), *_find_surplus(spec, owner, observed, stored, sets)),
        revisions=revisions,
        targets=targets,
        templates=templates,
        requeue_s=_next_moment(spec, observed, now),
    )


def _by_revision(children: list[Json]) -> dict[str, Json]:
    labelled = ((c["metadata"].get("labels", {}).get(REVISION_LABEL), c) for c in children)
    return {revision: child for revision, child in labelled if revision}


def _view_revision(revision: str, live: Json, spec: TokaDeploymentSpec, observed: Observed, now: float) -> RevisionPods:
    replicas = int(live["spec"].get("replicas", 1))
    pods = [pod for pod in observed.pods if pod.revision == revision]
    min_ready_s = spec.rollout.min_ready_s
    return RevisionPods(
        replicas=replicas,
        available=frozenset(p.ordinal for p in pods if p.is_available(now, min_ready_s)),
        hopeless=frozenset(p.ordinal for p in pods if _is_hopeless(p, now)),
        num_draining=sum(1 for p in pods if p.ordinal >= replicas and not p.is_stuck(now, spec.rollout.stuck_s)),
    )


def _is_hopeless(pod: PodView, now: float) -> bool:
    """Failing before its first start or again and again, or not ready for long, whatever the reason."""
    if pod.is_ready:
        return False
    if pod.ready_since and now >= pod.ready_since + HOPELESS_AFTER_S:
        return True
    if pod.failure is None or not pod.is_failing:
        return False
    return pod.failure.exit_code is None or pod.failure.restarts >= MIN_RESTARTS_OF_HOPELESS


def _find_finished_sets(
    spec: TokaDeploymentSpec, sets: Mapping[str, Json], targets: Mapping[str, int], observed: Observed
) -> dict[str, tuple[str, str, str]]:
    """Old revisions' StatefulSets with no pod asked for and none left."""
    with_pods = {pod.revision for pod in observed.pods}
    return {
        revision: (STATEFUL_SET, live["metadata"]["name"], live["metadata"]["uid"])
        for revision, live in sets.items()
        if revision != spec.revision
        and targets.get(revision) == 0
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
    targets: Mapping[str, int],
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
    stored: Mapping[str, Json],
    targets: Mapping[str, int],
    finished: Mapping[str, object],
) -> list[Json]:
    children = [render_service_account(owner), render_service(owner, spec)]
    numbers = {revision: int(child.get("revision", 0)) for revision, child in stored.items()}
    newest = max(numbers.values(), default=0)
    order = sorted(set(targets) - set(finished), key=lambda r: (r == spec.revision, numbers.get(r, 0), r))
    for revision in order:
        number = numbers.get(revision, newest + 1)
        if revision == spec.revision and any(n >= number for r, n in numbers.items() if r != revision):
            number = newest + 1
        children.append(render_revision(owner, revision, templates[revision], number))
        children.append(render_stateful_set(owner, revision, templates[revision], targets[revision]))
    budget = render_disruption_budget(owner, spec)
    return [*children, budget] if budget else children


def _find_surplus(
    spec: TokaDeploymentSpec,
    owner: Owner,
    observed: Observed,
    stored: Mapping[str, Json],
    sets: Mapping[str, Json],
) -> list[tuple[str, str, str]]:
    """A disruption budget no longer wanted, and revisions beyond the history's limit."""
    surplus = []
    budget = observed.children.get((POD_DISRUPTION_BUDGET, owner.name))
    if budget is not None and render_disruption_budget(owner, spec) is None:
        surplus.append(budget)
    old = [child for revision, child in stored.items() if revision != spec.revision and revision not in sets]
    old.sort(key=lambda child: -int(child.get("revision", 0)))
    surplus += old[spec.rollout.revision_history_limit :]
    return [(c["kind"], c["metadata"]["name"], c["metadata"]["uid"]) for c in surplus]


def _next_moment(spec: TokaDeploymentSpec, observed: Observed, now: float) -> float | None:
    """Seconds until a pod has been ready for long enough, or is given up as stuck or hopeless."""
    moments = [
        pod.ready_since + spec.rollout.min_ready_s for pod in observed.pods if pod.is_ready and not pod.is_terminating
    ]
    moments += [
        pod.ready_since + HOPELESS_AFTER_S
        for pod in observed.pods
        if pod.revision != spec.revision and not pod.is_ready and pod.ready_since
    ]
    endings = (p.terminating_until for p in observed.pods)
    moments += [ending + spec.rollout.stuck_s for ending in endings if ending is not None]
    return min((moment - now + 0.01 for moment in moments if moment >= now), default=None)
