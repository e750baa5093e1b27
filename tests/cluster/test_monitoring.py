"""spec.monitoring: a PodMonitor where the cluster has them, and a word where it has none."""

from __future__ import annotations

import yaml

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.monitors import with_pod_monitors
from tests.cluster.operating import CHART, SYSTEM, Operator, pod_uids


def test_a_pod_monitor_comes_when_its_kind_does_and_follows_the_spec(without_operator: Operator) -> None:
    operator = without_operator
    operator.start(TOKA_POD_MONITORS="true", TOKA_POD_MONITOR_LABELS="release=prometheus")
    operator.apply("demands", monitoring={"podMonitor": "On"})
    operator.apply("chat")
    operator.wait_until_ready("chat")
    operator.wait_until_ready("demands")
    away = operator.wait_for_condition("demands", "Monitored", "False", "NoPodMonitors")
    assert "Install the Prometheus operator" in away["message"]
    assert "Monitored" not in {each["type"] for each in operator.require("td", "chat")["status"]["conditions"]}

    pods = pod_uids(operator)
    with with_pod_monitors(operator.server):
        operator.wait_for(lambda: operator.get("podmonitor", "chat"), "the PodMonitor", timeout_s=90)
        made = operator.require("podmonitor", "chat")
        assert made["metadata"]["labels"]["release"] == "prometheus"
        assert made["spec"]["podMetricsEndpoints"] == [{"port": "http", "path": "/metrics"}]
        (pod,) = operator.pods("chat")
        assert made["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        ports = pod["spec"]["containers"][0]["ports"]
        assert [port["name"] for port in ports] == ["http"]
        operator.wait_for_condition("demands", "Monitored", "True", "PodMonitorMade")
        operator.edit("podmonitor", "chat", {"spec": {"podMetricsEndpoints": []}})
        operator.wait_for(lambda: operator.require("podmonitor", "chat")["spec"] == made["spec"], "the endpoint back")
        operator.patch("chat", monitoring={"podMonitor": "Off"})
        operator.wait_for(lambda: operator.get("podmonitor", "chat") is None, "the PodMonitor to go")
    operator.wait_for_condition("demands", "Monitored", "False", "NoPodMonitors")
    operator.patch("chat", monitoring=None)
    operator.wait_until_ready("chat")
    assert pod_uids(operator) == pods
    operator.stop()


def test_without_the_right_nothing_is_tried_and_a_demand_is_told(own_operator: Operator, pod_monitors: None) -> None:
    own_operator.apply("demands", monitoring={"podMonitor": "On"})
    own_operator.wait_until_ready("demands")
    refused = own_operator.wait_for_condition("demands", "Monitored", "False", "PodMonitorsNotAllowed")
    assert "monitoring.engines" in refused["message"]
    assert own_operator.get("podmonitor", "demands") is None
    assert "podmonitors" not in {resource for _, resource in own_operator.requests()}


def test_an_operator_that_is_given_the_right_makes_what_was_asked_for(
    without_operator: Operator, pod_monitors: None
) -> None:
    operator = without_operator
    operator.start()
    operator.apply("demands", monitoring={"podMonitor": "On"})
    operator.wait_for_condition("demands", "Monitored", "False", "PodMonitorsNotAllowed")
    operator.stop()
    operator.start(TOKA_POD_MONITORS="true")
    operator.wait_for_condition("demands", "Monitored", "True", "PodMonitorMade")
    operator.stop()


def test_the_chart_gives_the_right_and_monitors_the_operator_only_if_asked(
    api_server: ApiServer, installation: object, pod_monitors: None
) -> None:
    assert "podmonitors" in api_server.helm("template", "toka", str(CHART))
    assert "podmonitors" not in api_server.helm("template", "toka", str(CHART), "--set", "monitoring.engines=false")
    values = ("--set", "monitoring.operator=true,monitoring.labels.release=prometheus", "--namespace", SYSTEM)
    rendered = api_server.helm("template", "toka", str(CHART), *values)
    (monitor,) = [m for m in yaml.safe_load_all(rendered) if m and m["kind"] == "PodMonitor"]
    (deployment,) = [m for m in yaml.safe_load_all(rendered) if m and m["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert [each["port"] for each in monitor["spec"]["podMetricsEndpoints"]] == ["health"]
    assert {"name": "TOKA_POD_MONITOR_LABELS", "value": "release=prometheus"} in pod["spec"]["containers"][0]["env"]
    api_server.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=yaml.safe_dump(monitor))
