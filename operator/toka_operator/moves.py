"""Pods on cordoned nodes: which of them move, and how long their eviction is held up for their successors.

Owns: both decisions. Pure. A pod that would be given the same node again does not move, nor one whose ordinal has data,
which its successor gets only when it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from toka_operator.failures import CLAIM_ON_ONE_NODE
from toka_operator.fields import Json
from toka_operator.observed import Observed, PodView
from toka_operator.spec import TokaDeploymentSpec

_CORDON_TAINT = "node.kubernetes.io/unschedulable"
"""The taint that Kubernetes gives to a cordoned node."""


def find_displaced(spec: TokaDeploymentSpec, observed: Observed) -> tuple[PodView, ...]:
    """The pods that are to be replaced, because their node is cordoned."""
    if not observed.cordoned or not _can_move(spec):
        return ()
    cordoned = observed.cordoned
    return tuple(pod for pod in observed.pods if pod.node in cordoned and not pod.is_terminating)


def holds_only_pod(spec: TokaDeploymentSpec, observed: Observed, now: float) -> bool:
    """Whether nobody may evict the only pod: its successor comes first, or nobody asked for it yet.

    Only where the operator sees that a node is cordoned, else the budget of one pod would hold a drain for ever.
    """
    is_single = spec.num_wanted == 1 and spec.rollout.max_unavailable == 0
    if not is_single or observed.cordoned is None or not _can_move(spec):
        return False
    end = find_hold_end(spec, observed, now)
    return end is None or now < end


def find_hold_end(spec: TokaDeploymentSpec, observed: Observed, now: float) -> float | None:
    """The Unix time at which a drain is no longer held up, because the successor finds no room, or does not become
    available; None while there is none that is waited for."""
    displaced = {pod.name for pod in find_displaced(spec, observed)}
    if not displaced:
        return None
    if observed.missing_pods:
        return 0.0  # the API server refuses the successor
    coming = [
        pod
        for pod in observed.pods
        if (pod.revision == spec.revision or not pod.has_served)  # of an older one where that is not replaced
        and pod.name not in displaced
        and not pod.is_terminating
        and not pod.is_available(now, spec.rollout.min_ready_s)
    ]
    return min((_find_end_of_hope(spec, pod) for pod in coming), default=None)


def _find_end_of_hope(spec: TokaDeploymentSpec, pod: PodView) -> float:
    """The time until which a drain waits for a pod, which may have served before."""
    failure = pod.failure
    lacks_room = failure is not None and (failure.is_waiting_for_capacity or failure.reason == CLAIM_ON_ONE_NODE)
    if failure is not None and lacks_room and pod.is_failing:
        return (failure.since or pod.created_at) + spec.scheduling.patience_s
    return max(pod.created_at, pod.ready_since) + spec.rollout.progress_deadline_s


def _can_move(spec: TokaDeploymentSpec) -> bool:
    return spec.data is None and spec.rollout.max_surge > 0 and not tolerates_cordon(spec.scheduling.tolerations)


def tolerates_cordon(tolerations: Sequence[Json]) -> bool:
    """Whether pods may be given a cordoned node."""
    return any(
        toleration.get("effect") in (None, "", "NoSchedule")
        and (
            toleration.get("key") == _CORDON_TAINT
            or (not toleration.get("key") and toleration.get("operator") == "Exists")
        )
        for toleration in tolerations
    )
