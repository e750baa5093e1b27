"""spec.monitoring: whether Prometheus is told of the engine pods by a PodMonitor.

Owns: when there is one, and what is said where there cannot be one. Pure. The Prometheus operator brings PodMonitors to
a cluster; most clusters have it, and none needs it.
"""

from __future__ import annotations

from toka_operator.advice import add_advice
from toka_operator.fields import Json
from toka_operator.sight import KNOWN, UNKNOWN

MONITORING_DEFAULTS: Json = {"podMonitor": "Auto"}
POD_MONITOR_CHOICES = ("Auto", "On", "Off")


def wants_pod_monitor(choice: str, sight: str) -> bool:
    """Whether there is to be a PodMonitor."""
    return choice != "Off" and sight == KNOWN


def explain_monitored(sight: str) -> tuple[bool, str, str]:
    """Status, reason and message of the condition of a spec that demands a PodMonitor."""
    if sight == KNOWN:
        return True, "PodMonitorMade", "a PodMonitor tells Prometheus of the pods"
    if sight == UNKNOWN:
        return False, "NoPodMonitors", add_advice("NoPodMonitors", "the API server has no PodMonitors")
    told = add_advice("PodMonitorsNotAllowed", "the operator was installed without the right to make PodMonitors")
    return False, "PodMonitorsNotAllowed", told


def render_pod_monitor_spec(selector: dict[str, str]) -> Json:
    """The spec of a PodMonitor of the pods with these labels. Prometheus adds the labels namespace and pod."""
    return {"selector": {"matchLabels": selector}, "podMetricsEndpoints": [{"port": "http", "path": "/metrics"}]}
