"""spec.routing: an InferencePool and an HTTPRoute where the cluster has them, and a word where it has none."""

from __future__ import annotations

from tests.cluster.gateways import accept, with_kinds
from tests.cluster.harness.api_only import ApiServer
from tests.cluster.operating import CHART, Json, Operator, pod_uids

PICKER = {"name": "picker", "port": 9003, "failureMode": "FailOpen"}
POOL: Json = {"inferencePool": {"endpointPickerRef": PICKER}}
ROUTE: Json = {
    "httpRoute": {
        "parentRefs": [{"name": "web", "namespace": "edge", "sectionName": "https"}],
        "hostnames": ["chat.example.com"],
    }
}


def backend(operator: Operator) -> str:
    """The kind of what the HTTPRoute `chat` goes to."""
    (rule,) = operator.require("httproute", "chat")["spec"]["rules"]
    (found,) = rule["backendRefs"]
    assert found["name"] == "chat"
    return str(found["kind"])


def test_pool_and_route_come_when_their_kinds_do_and_follow_the_spec(without_operator: Operator) -> None:
    operator = without_operator
    operator.start(TOKA_ROUTES="true")
    operator.apply("chat", routing={**POOL, **ROUTE})
    operator.wait_until_ready("chat")
    away = operator.wait_for_condition("chat", "Routed", "False", "NoHTTPRoutes")
    assert "Install the Gateway API" in away["message"]
    pods = pod_uids(operator)
    with with_kinds(operator.server, "HTTPRoute"):
        operator.wait_for(lambda: operator.get("httproute", "chat"), "the HTTPRoute", timeout_s=90)
        assert backend(operator) == "Service"
        without_pool = operator.wait_for_condition("chat", "Routed", "False", "NoInferencePools")
        assert "requests go to the Service" in without_pool["message"]
        with with_kinds(operator.server, "InferencePool"):
            operator.wait_for(lambda: operator.get("inferencepool", "chat"), "the pool", timeout_s=90)
            operator.wait_for(lambda: backend(operator) == "InferencePool", "the route to go to the pool")
            check_pool(operator)
            follow_the_spec(operator)
        operator.wait_for(lambda: backend(operator) == "Service", "the route to do without the pool", timeout_s=90)
        operator.patch("chat", routing=None)
        operator.wait_for(lambda: operator.get("httproute", "chat") is None, "the HTTPRoute to go")
    operator.wait_until_ready("chat")
    assert pod_uids(operator) == pods
    operator.stop()


def check_pool(operator: Operator) -> None:
    pool = operator.require("inferencepool", "chat")
    assert pool["spec"]["selector"]["matchLabels"] == operator.require("service", "chat")["spec"]["selector"]
    (pod,) = operator.pods("chat")
    (port,) = pod["spec"]["containers"][0]["ports"]
    assert pool["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    reference = {"group": "", "kind": "Service", **PICKER, "port": {"number": PICKER["port"]}}
    assert pool["spec"]["endpointPickerRef"] == reference
    (owner,) = pool["metadata"]["ownerReferences"]
    assert owner["uid"] == operator.require("td", "chat")["metadata"]["uid"]


def follow_the_spec(operator: Operator) -> None:
    """A gateway's word on the route is told; what is changed by hand is put back; what the spec changes, changes."""
    operator.wait_for_condition("chat", "Routed", "False", "RouteWaits")
    accept(operator, "chat", "no listener https")
    refused = operator.wait_for_condition("chat", "Routed", "False", "RouteNotAccepted")
    assert "Gateway web: no listener https" in refused["message"]
    accept(operator, "chat")
    operator.wait_for_condition("chat", "Routed", "True", "RouteAccepted")

    made = operator.require("httproute", "chat")["spec"]
    elsewhere = {"parentRefs": [{"name": "theirs"}], "hostnames": ["x.example.com"]}
    operator.edit("httproute", "chat", {"spec": elsewhere})
    operator.wait_for(lambda: operator.require("httproute", "chat")["spec"] == made, "the route as it was")
    labels = {"app": "theirs"}
    operator.edit("inferencepool", "chat", {"spec": {"selector": {"matchLabels": labels}}})
    operator.wait_for(
        lambda: operator.require("inferencepool", "chat")["spec"]["selector"]["matchLabels"].keys().isdisjoint(labels),
        "the pool's selector as it was",
    )
    operator.delete_and_wait("inferencepool", "chat")
    operator.wait_for(lambda: operator.get("inferencepool", "chat"), "the pool to come back")

    operator.patch("chat", routing={"httpRoute": {"parentRefs": [{"name": "inner"}], "hostnames": None}})
    operator.wait_for(lambda: "hostnames" not in spec_of_route(operator), "the route without hostnames")
    (parent,) = spec_of_route(operator)["parentRefs"]
    assert parent == {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "inner"}
    operator.patch("chat", routing={"httpRoute": None})
    operator.wait_for(lambda: operator.get("httproute", "chat") is None, "the HTTPRoute to go")
    operator.wait_for_condition("chat", "Routed", "True", "PoolMade")
    operator.patch("chat", routing={**POOL, **ROUTE})
    operator.wait_for(lambda: operator.get("httproute", "chat"), "the HTTPRoute anew")
    operator.wait_for(lambda: backend(operator) == "InferencePool", "it to go to the pool")


def spec_of_route(operator: Operator) -> Json:
    """The HTTPRoute's spec, without empty lists."""
    return {name: value for name, value in operator.require("httproute", "chat")["spec"].items() if value != []}


def test_a_users_own_pool_is_left_alone_and_gets_no_requests(without_operator: Operator, gateway_kinds: None) -> None:
    operator = without_operator
    operator.expected.append("event=name_taken")
    theirs: Json = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool"}
    theirs |= {"metadata": {"name": "chat"}, "spec": {"selector": {"matchLabels": {"app": "x"}}}}
    theirs["spec"] |= {"targetPorts": [{"number": 1}], "endpointPickerRef": {"name": "x", "port": {"number": 1}}}
    operator.server.apply(theirs, namespace=operator.namespace)
    before = operator.require("inferencepool", "chat")
    operator.start(TOKA_ROUTES="true")
    operator.apply("chat", routing={**POOL, **ROUTE})
    taken = operator.wait_for_condition("chat", "Degraded", "True", "NameTaken")
    assert "InferencePool chat" in taken["message"]
    operator.wait_for(lambda: operator.get("httproute", "chat"), "the HTTPRoute")
    assert backend(operator) == "Service"
    assert operator.require("inferencepool", "chat") == before
    operator.delete_and_wait("inferencepool", "chat")
    operator.wait_for(lambda: backend(operator) == "InferencePool", "the route to go to a pool of ours")
    operator.wait_until_ready("chat")
    operator.stop()


def test_routing_without_the_right_is_told_and_nothing_is_tried(own_operator: Operator, gateway_kinds: None) -> None:
    own_operator.apply("chat", routing={**POOL, **ROUTE})
    own_operator.wait_until_ready("chat")
    refused = own_operator.wait_for_condition("chat", "Routed", "False", "RoutingNotAllowed")
    assert "routing.enabled" in refused["message"]
    assert own_operator.get("httproute", "chat") is None
    assert {"httproutes", "inferencepools"}.isdisjoint(resource for _, resource in own_operator.requests())


def test_the_chart_gives_the_right_unless_it_is_told_not_to(api_server: ApiServer, installation: object) -> None:
    for kind in ("httproutes", "inferencepools"):
        assert kind in api_server.helm("template", "toka", str(CHART))
        assert kind not in api_server.helm("template", "toka", str(CHART), "--set", "routing.enabled=false")
