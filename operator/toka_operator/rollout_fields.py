"""spec.rollout: how pods are replaced, as typed values.

Owns: its defaults, its check, and what each strategy means in pods more and fewer than desired. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from toka_operator.fields import Fields, Json

ROLLOUT_DEFAULTS: Json = {
    "strategy": "Surge",
    "maxSurge": 1,
    "maxUnavailable": 0,
    "minReadySeconds": 5,
    "progressDeadlineSeconds": 3600,
    "drainDelaySeconds": 5,
    "drainTimeoutSeconds": 120,
    "stuckSeconds": 30,
    "paused": False,
    "onFailure": "Hold",
    "canary": {"seconds": 0},
    "revisionHistoryLimit": 3,
}


@dataclass(frozen=True, slots=True)
class Rollout:
    strategy: str
    """Surge, InPlace or Recreate."""
    max_surge: int
    """0 in the strategies without surge."""
    max_unavailable: int
    """At least 1 with InPlace. 0 with Recreate, whose rollouts take all the same."""
    surge_fallback_s: int | None
    """Seconds that a surge pod waits for a node before an old pod goes first; None: for ever."""
    min_ready_s: int
    progress_deadline_s: int
    drain_delay_s: int
    """Seconds for which a pod that goes still takes requests, while the Service's endpoints and kube-proxy move."""
    drain_timeout_s: int
    stuck_s: int
    """Seconds after its grace period from which a pod that goes counts as stuck."""
    paused: bool
    on_failure: str
    """Hold or Rollback: what becomes of a rollout that makes no progress within its deadline."""
    canary_s: int
    """Seconds for which the first new pod has traffic before it is judged; 0: there is no canary."""
    revision_history_limit: int


def parse_rollout(fields: Fields) -> Rollout:
    """The rollout's settings; what is wrong with them is added to `fields.errors`."""
    strategy = fields.choice("strategy", ("Surge", "InPlace", "Recreate"))
    max_surge, max_unavailable = fields.integer("maxSurge", 0, 1000), fields.integer("maxUnavailable", 0, 1000)
    fallback_s = fields.optional_integer("surgeFallbackSeconds", 0, 86400)
    if strategy == "Surge" and max_surge + max_unavailable == 0:
        fields.refuse("maxSurge", "may not be 0 together with maxUnavailable: no pod could ever be replaced")
    if strategy != "Surge" and max_surge > ROLLOUT_DEFAULTS["maxSurge"]:
        fields.refuse("maxSurge", "is only for strategy Surge: the others make no pod beyond replicas")
    if strategy == "Recreate" and max_unavailable > 0:
        fields.refuse("maxUnavailable", "is not for strategy Recreate, which ends all old pods first")
    if fallback_s is not None and (strategy != "Surge" or max_surge == 0):
        fields.refuse("surgeFallbackSeconds", "is only for strategy Surge with a maxSurge above 0")
    canary_s = fields.child("canary").integer("seconds", 0, 86400)
    if canary_s and (strategy != "Surge" or max_surge == 0):
        fields.refuse("canary", "is only for strategy Surge with a maxSurge above 0: old pods serve beside it")
    if canary_s and fallback_s is not None:
        fields.refuse("canary", "excludes surgeFallbackSeconds, which takes away the old pods that it is compared with")
    rollout = Rollout(
        strategy=strategy,
        max_surge=max_surge if strategy == "Surge" else 0,
        max_unavailable=max(1, max_unavailable) if strategy == "InPlace" else max_unavailable,
        surge_fallback_s=fallback_s,
        min_ready_s=fields.integer("minReadySeconds", 0, 3600),
        progress_deadline_s=fields.integer("progressDeadlineSeconds", 11, 604800),
        drain_delay_s=fields.integer("drainDelaySeconds", 0, 600),
        drain_timeout_s=fields.integer("drainTimeoutSeconds", 0, 86400),
        stuck_s=fields.integer("stuckSeconds", 0, 86400),
        paused=fields.boolean("paused"),
        on_failure=fields.choice("onFailure", ("Hold", "Rollback")),
        canary_s=canary_s,
        revision_history_limit=fields.integer("revisionHistoryLimit", 0, 50),
    )
    if rollout.progress_deadline_s <= rollout.min_ready_s:
        fields.refuse("progressDeadlineSeconds", "must be greater than minReadySeconds")
    if rollout.progress_deadline_s <= canary_s:
        fields.refuse("progressDeadlineSeconds", "must be greater than canary.seconds")
    return rollout
