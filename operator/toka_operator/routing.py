"""spec.routing: how requests come in by the Gateway API, and who chooses their pod.

Owns: the fields, the specs of the InferencePool and the HTTPRoute, and what a gateway's word on the route means for our
condition. Pure. Both kinds come with definitions that a cluster need not have. The operator runs neither a gateway nor
an endpoint picker: it tells those that are there of its pods.
"""

from __future__ import annotations

from dataclasses import dataclass

from toka_operator.advice import add_advice
from toka_operator.fields import Fields, Json
from toka_operator.sight import NOT_ALLOWED, UNKNOWN

ROUTING_DEFAULTS: Json = {"inferencePool": {}, "httpRoute": {}}
PICKER_DEFAULTS: Json = {"port": 9002, "failureMode": "FailClose"}
_GATEWAY_GROUP, _POOL_GROUP = "gateway.networking.k8s.io", "inference.networking.k8s.io"
_SAID_OF_ROUTES = ("Accepted", "ResolvedRefs")
"""Conditions of an HTTPRoute, one of each for every Gateway that it names."""


@dataclass(frozen=True, slots=True)
class Picker:
    """The Service of an endpoint picker, in the object's namespace."""

    name: str
    port: int
    failure_mode: str


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing that a spec asks for."""

    picker: Picker | None
    """None: there is to be no InferencePool."""
    gateways: tuple[Json, ...]
    """The parentRefs of the HTTPRoute; there is none without."""
    hostnames: tuple[str, ...]

    @property
    def is_wanted(self) -> bool:
        """Whether anything is asked for."""
        return self.picker is not None or bool(self.gateways)


def parse_routing(fields: Fields) -> Routing:
    """The routing that a spec asks for."""
    route = fields.child("httpRoute")
    gateways, hostnames = route.items("parentRefs", dict), route.items("hostnames", str)
    if hostnames and not gateways:
        route.refuse("hostnames", "are only for an HTTPRoute: name a Gateway in parentRefs")
    return Routing(_parse_picker(fields.child("inferencePool")), gateways, hostnames)


def _parse_picker(fields: Fields) -> Picker | None:
    name = "endpointPickerRef"
    if fields.get(name) is None:
        return None
    picker = Fields(fields.mapping(name), PICKER_DEFAULTS, f"{fields.path}.{name}", fields.errors)
    mode = picker.choice("failureMode", ("FailClose", "FailOpen"))
    return Picker(picker.text("name"), picker.integer("port", 1, 65535), mode)


def render_pool_spec(picker: Picker, selector: dict[str, str], port: int) -> Json:
    """The spec of the InferencePool of the pods with these labels, which listen on `port`."""
    reference = {"kind": "Service", "name": picker.name, "port": {"number": picker.port}}
    return {
        "selector": {"matchLabels": selector},
        "targetPorts": [{"number": port}],
        "endpointPickerRef": {**reference, "failureMode": picker.failure_mode},
    }


def render_route_spec(routing: Routing, name: str, service_port: int | None) -> Json:
    """The spec of the HTTPRoute to the Service `name` at `service_port`; None: to the InferencePool `name`."""
    service = {"group": "", "kind": "Service", "name": name, "port": service_port, "weight": 1}
    pool = {"group": _POOL_GROUP, "kind": "InferencePool", "name": name, "weight": 1}
    every_path = {"path": {"type": "PathPrefix", "value": "/"}}
    return {
        "parentRefs": [{"group": _GATEWAY_GROUP, "kind": "Gateway", **gateway} for gateway in routing.gateways],
        "hostnames": list(routing.hostnames),
        "rules": [{"matches": [every_path], "backendRefs": [pool if service_port is None else service]}],
    }


def explain_routed(routing: Routing, pools: str, routes: str, route: Json | None) -> tuple[bool, str, str]:
    """Status, reason and message of our condition. `pools`, `routes`: how those kinds are seen. `route`: the HTTPRoute
    as the gateways left it."""
    sights = ([pools] if routing.picker is not None else []) + ([routes] if routing.gateways else [])
    if NOT_ALLOWED in sights:
        refused = "the operator was installed without the right to make InferencePools and HTTPRoutes"
        return False, "RoutingNotAllowed", add_advice("RoutingNotAllowed", refused)
    if routing.gateways and routes == UNKNOWN:
        return False, "NoHTTPRoutes", add_advice("NoHTTPRoutes", "the API server has no HTTPRoutes")
    if routing.picker is not None and pools == UNKNOWN:
        instead = ", and requests go to the Service" if routing.gateways else ""
        message = f"the API server has no InferencePools{instead}"
        return False, "NoInferencePools", add_advice("NoInferencePools", message)
    if not routing.gateways:
        return True, "PoolMade", "an InferencePool tells gateways and their endpoint picker of the pods"
    return _explain_route(routing, route or {})


def _explain_route(routing: Routing, route: Json) -> tuple[bool, str, str]:
    """The gateways' word on the HTTPRoute, as far as it is about its present generation."""
    generation = int((route.get("metadata") or {}).get("generation", 0))
    said: dict[str, list[str]] = {kind: [] for kind in _SAID_OF_ROUTES}
    for parent in (route.get("status") or {}).get("parents") or []:
        for condition in parent.get("conditions") or []:
            if condition["type"] not in said or int(condition.get("observedGeneration", generation)) < generation:
                continue
            said[condition["type"]].append(condition["status"])
            if condition["status"] == "False":
                message = f"Gateway {parent['parentRef']['name']}: {str(condition.get('message'))[:1024]}"
                return False, "RouteNotAccepted", add_advice("RouteNotAccepted", message)
    num_accepting = min(statuses.count("True") for statuses in said.values())
    if num_accepting < len(routing.gateways):
        told = f"{num_accepting} of {len(routing.gateways)} Gateways have accepted the HTTPRoute"
        return False, "RouteWaits", add_advice("RouteWaits", told)
    return True, "RouteAccepted", "the Gateways have accepted the HTTPRoute"
