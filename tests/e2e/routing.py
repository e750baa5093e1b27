"""`python -m tests.e2e.routing`: shared prefixes that are found behind an endpoint picker, and how even the load is.

A TokaDeployment with `routing` on a cluster of two nodes is asked the same kind of load three times, each with prefixes
of its own: one replica through the Service, two replicas through the Service, and two through Envoy with the endpoint
picker of the Gateway API inference extension. Prints one JSON line: of each, the share of prompt tokens that were found
in a prefix cache, and the busiest pod's requests over those of an even share. Ends with 1 if a request failed, if the
picker's share is below 0.9 of one replica's, or its busiest pod has more than 1.3 of an even share.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from toka_engine.output import run_command

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.definitions import require_definition
from tests.cluster.harness.gateway_tools import ensure_envoy, ensure_picker
from tests.cluster.harness.handle import Object
from tests.cluster.harness.tools import ensure_tools
from tests.e2e.gateway import install_kinds, start_gateway
from tests.e2e.installation import Deployment, Installation

ENOUGH_OF_ONE, MOST_OF_EVEN = 0.9, 1.3
KINDS = ("HTTPRoute", "InferencePool", "InferenceObjective", "InferenceModelRewrite")
"""The last two are the picker's own, which looks for them."""
_COUNTS = (
    r"toka_prompt_tokens_total",
    r"toka_prefix_hit_tokens_total",
    r"toka_requests_total\{[^}]*/v1/completions[^}]*\}",
)


def count(deployment: Deployment, pod: Object) -> list[float]:
    """The prompt tokens, those found in a prefix cache, and the requests that a pod has had."""
    address = f"http://{pod['status']['podIP']}:10210/metrics"
    text = deployment.installation.run_client("fetch.py", address)
    return [sum(map(float, re.findall(rf"^{name} ([0-9.e+]+)$", text, re.M))) for name in _COUNTS]


def measure(deployment: Deployment, url: str, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One load, and what the pods counted of it."""
    pods = deployment.pods()
    before = [count(deployment, pod) for pod in pods]
    shape = (arguments.prefixes, arguments.repeats, arguments.words, arguments.clients, seed)
    words = map(str, (url, deployment.name, *shape))
    answer = json.loads(deployment.installation.run_client("prefixes.py", *words, timeout_s=1200.0))
    after = [count(deployment, pod) for pod in pods]
    prompts, hits, _ = (sum(b[n] - a[n] for a, b in zip(before, after, strict=True)) for n in range(3))
    requests = [b[2] - a[2] for a, b in zip(before, after, strict=True)]
    found = {
        "replicas": len(pods),
        "answered": answer["answered"],
        "failed": answer["failed"][:3],
        "seconds": round(answer["seconds"], 1),
        "found_share": round(hits / prompts, 3),
        "busiest_over_even": round(max(requests) / (sum(requests) / len(pods)), 2),
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    ensure_tools("definitions")
    ensure_picker()
    ensure_envoy()
    cluster = Cluster.start(2, "routing")
    try:
        install_kinds(cluster, [require_definition(kind) for kind in KINDS])
        installation = Installation.install(cluster)
        spec: dict[str, Any] = {
            "engine": {"extraArgs": ["num_threads=1"], "kvCacheNumTokens": 32768},
            "routing": {"inferencePool": {"endpointPickerRef": {"name": "picker"}}},
        }
        deployment = installation.deploy(installation.new_namespace("routing"), "smollm2", **spec)
        deployment.wait_until_ready(1200.0)
        one = measure(deployment, deployment.url, arguments, 1)
        deployment.scale_to(2)
        service = measure(deployment, deployment.url, arguments, 2)
        gateway = start_gateway(cluster, deployment.namespace, deployment.name)
        picked = measure(deployment, gateway, arguments, 3)
    finally:
        cluster.stop()
    return {
        **{name: getattr(arguments, name) for name in ("prefixes", "repeats", "words", "clients")},
        "one": one,
        "service": service,
        "picked": picked,
        "service_of_one": round(service["found_share"] / one["found_share"], 2),
        "picked_of_one": round(picked["found_share"] / one["found_share"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.routing", description=__doc__)
    parser.add_argument("--prefixes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=4, help="requests with each prefix")
    parser.add_argument("--words", type=int, default=240, help="words of each prefix: about as many tokens")
    parser.add_argument("--clients", type=int, default=4)
    found = run(parser.parse_args())
    print(json.dumps(found))
    picked = found["picked"]
    is_well = found["picked_of_one"] >= ENOUGH_OF_ONE and picked["busiest_over_even"] <= MOST_OF_EVEN
    return 0 if is_well and not any(found[name]["failed"] for name in ("one", "service", "picked")) else 1


if __name__ == "__main__":
    run_command(main)
