"""A gateway for the end-to-end measurements: Envoy, and the endpoint picker of the Gateway API inference extension.

Both are the real programs, in the control plane's network, which reaches pods. There is no controller of Gateways:
Envoy has the configuration here that one makes of an HTTPRoute whose backend is an InferencePool. The picker reads the
pool, its pods and their metrics by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.gateway_tools import ensure_envoy
from tests.cluster.harness.node import BRIDGE_ADDRESS
from tests.cluster.harness.paths import tool
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.harness.trees import run_checked

PORT = 8081
_PICKER_PORT, _ADMIN_PORT = 9002, 19000
_TYPE = "type.googleapis.com/envoy.extensions"
_DESTINATION = "x-gateway-destination-endpoint"
"""The header by which the picker names the pod: a word of the inference extension's protocol."""
_SCORERS = {"queue-scorer": 2, "kv-cache-utilization-scorer": 2, "prefix-cache-scorer": 3}
"""The scorers that the inference extension's chart has by default, and their weights."""


def start_gateway(cluster: Cluster, namespace: str, pool: str) -> str:
    """Start both for a pool, and return the base URL that pods of the cluster ask, which is answered by then."""
    picker = _start_picker(cluster, namespace, pool)
    file = cluster.run.path / "envoy.json"
    file.write_text(json.dumps(_configure_envoy()))
    # Without --base-id a second Envoy on this machine would take this one for itself.
    argv = [str(ensure_envoy()), "-c", str(file), "--use-dynamic-base-id", "--log-level", "warning"]
    envoy = cluster.spawn("envoy", argv)
    url = f"http://{BRIDGE_ADDRESS}:{PORT}/v1"
    ask = [*cluster.enter_network(), "curl", "--silent", "--fail", f"{url}/models"]
    cluster.wait_for(lambda: run_checked(ask), f"an answer through Envoy: {envoy.log_file}, {picker.log_file}")
    return url


def _start_picker(cluster: Cluster, namespace: str, pool: str) -> ProcessHandle:
    profile = {"name": "default", "plugins": [{"pluginRef": name, "weight": n} for name, n in _SCORERS.items()]}
    configuration = {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [{"type": name} for name in _SCORERS],
        "schedulingProfiles": [profile],
    }
    off = ("secure-serving", "metrics-endpoint-auth", "tracing", "enable-pprof")
    argv = [
        tool("epp"),
        f"--pool-namespace={namespace}",
        f"--pool-name={pool}",
        f"--grpc-port={_PICKER_PORT}",
        f"--config-text={json.dumps(configuration)}",
        *(f"--{name}=false" for name in off),
    ]
    return cluster.spawn("picker", argv, {"KUBECONFIG": str(cluster.kubeconfig)})


def _configure_envoy() -> dict[str, Any]:
    processing = {
        "request_header_mode": "SEND",
        "response_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_trailer_mode": "SEND",
    }
    asking = {
        "@type": f"{_TYPE}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "10s"},
        "processing_mode": processing,
        "message_timeout": "600s",
    }
    sending = {"@type": f"{_TYPE}.filters.http.router.v3.Router"}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "pod", "timeout": "0s"}}
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "route_config": {"virtual_hosts": [{"name": "pool", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": asking},
            {"name": "envoy.filters.http.router", "typed_config": sending},
        ],
    }
    named = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    listener = {"name": "gateway", "address": _address("0.0.0.0", PORT), "filter_chains": [{"filters": [named]}]}
    http2 = {
        "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    picker = {
        "name": "picker",
        "type": "STATIC",
        "typed_extension_protocol_options": {f"{_TYPE.partition('/')[2]}.upstreams.http.v3.HttpProtocolOptions": http2},
        "load_assignment": {
            "cluster_name": "picker",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address("127.0.0.1", _PICKER_PORT)}}]}],
        },
    }
    pod = {
        "name": "pod",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": _DESTINATION},
    }
    admin = {"address": _address("127.0.0.1", _ADMIN_PORT)}
    return {"admin": admin, "static_resources": {"listeners": [listener], "clusters": [picker, pod]}}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def install_kinds(cluster: Cluster, files: list[Path]) -> None:
    """Give the cluster the kinds that these files define."""
    for file in files:
        cluster.kubectl("apply", "--server-side", "-f", str(file))
    names = [str(_read(file)["metadata"]["name"]) for file in files]
    # A kind's full name lists its objects, if it is served.
    cluster.wait_for(lambda: all(_is_served(cluster, name) for name in names), f"{names} to be served")


def _is_served(cluster: Cluster, name: str) -> bool:
    cluster.kubectl("get", name)
    return True


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found
