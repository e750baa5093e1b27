"""spec.autoscaling: a HorizontalPodAutoscaler that sets the replicas of the TokaDeployment.

Owns: the fields, the names of the metrics, the autoscaler's spec, and what its own conditions mean for ours. Pure. The
autoscaler writes to the scale subresource of the TokaDeployment, never of a StatefulSet: which revision has how many
pods is for the rollout to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from toka_operator.advice import add_advice
from toka_operator.fields import Fields, Json

AUTOSCALING_DEFAULTS: Json = {
    "enabled": False,
    "minReplicas": 1,
    "metric": "WaitingRequests",
    "scaleDownStabilizationSeconds": 300,
}
METRICS = {
    "WaitingRequests": "toka_waiting",
    "RunningRequests": "toka_running",
    "KVCacheUtilization": "toka_kv_cache_utilization",
}
"""The metric of each pod that custom.metrics.k8s.io has to serve."""
_MAX_REPLICAS = 1000


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """The autoscaler that a spec asks for."""

    min_replicas: int
    max_replicas: int
    metric: str
    target: int
    scale_down_stabilization_s: int


def parse_autoscaling(fields: Fields) -> Autoscaling | None:
    """The autoscaler that a spec asks for; None if that is not enabled. The other fields are checked all the same."""
    found = Autoscaling(
        min_replicas=fields.integer("minReplicas", 1, _MAX_REPLICAS),
        max_replicas=fields.optional_integer("maxReplicas", 1, _MAX_REPLICAS) or 0,
        metric=fields.choice("metric", tuple(METRICS)),
        target=fields.optional_integer("target", 1, 100000) or 0,
        scale_down_stabilization_s=fields.integer("scaleDownStabilizationSeconds", 0, 3600),
    )
    if not fields.boolean("enabled"):
        return None
    for name, value in (("maxReplicas", found.max_replicas), ("target", found.target)):
        if not value and fields.get(name) is None:
            fields.refuse(name, "is needed while autoscaling is enabled")
    if found.max_replicas and found.min_replicas > found.max_replicas:
        fields.refuse("minReplicas", "may not be more than maxReplicas")
    if found.metric == "KVCacheUtilization" and found.target > 100:
        fields.refuse("target", "of KVCacheUtilization is a percentage, at most 100")
    return found


def render_autoscaler_spec(wanted: Autoscaling, target: Json) -> Json:
    """The spec of the HorizontalPodAutoscaler of `target`."""
    average = {"type": "AverageValue", "averageValue": _quantity(wanted)}
    return {
        "scaleTargetRef": target,
        "minReplicas": wanted.min_replicas,
        "maxReplicas": wanted.max_replicas,
        "metrics": [{"type": "Pods", "pods": {"metric": {"name": METRICS[wanted.metric]}, "target": average}}],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": wanted.scale_down_stabilization_s}},
    }


def _quantity(wanted: Autoscaling) -> str:
    """The target as Kubernetes spells it: a share of one, of the cache, else sequences."""
    if wanted.metric != "KVCacheUtilization":
        thousands, rest = divmod(wanted.target, 1000)
        return str(wanted.target) if rest else f"{thousands}k"
    return "1" if wanted.target == 100 else f"{wanted.target * 10}m"


def explain_autoscaled(autoscaler: Json | None) -> tuple[bool, str, str]:
    """Status, reason and message of our condition: what the autoscaler says of itself."""
    status = (autoscaler or {}).get("status") or {}
    told = {condition["type"]: condition for condition in status.get("conditions") or []}
    for kind in ("AbleToScale", "ScalingActive"):
        if told.get(kind, {}).get("status") == "False":
            reason = str(told[kind].get("reason"))
            return False, reason, add_advice(reason, str(told[kind].get("message"))[:1024])
    if "ScalingActive" not in told:
        return False, "AutoscalerStarting", "the autoscaler has not read its metric yet"
    return True, "MetricRead", "the autoscaler sets the replicas"
