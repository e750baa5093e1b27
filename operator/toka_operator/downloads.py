"""Engines tell how far their downloads are; this makes the status of a cache and the condition ModelCached of it.

Owns: the shape of the engine's answer, the words, and the one thing that the spec and the pods' nodes tell together: a
claim that only one node can mount. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from toka_operator.failures import CLAIM_ON_ONE_NODE, Failure
from toka_operator.fields import Json
from toka_operator.observed import Download, Observed, PodView
from toka_operator.resources import CLAIM
from toka_operator.spec import TokaDeploymentSpec

_ONE_NODE_MODES = {"ReadWriteOnce", "ReadWriteOncePod"}
_MAX_NUMBER = 2**63 - 1
"""The largest integer that a status may have."""
DONE = "done"


def parse_download(answer: bytes) -> Download | None:
    """The download in an engine's answer to /readyz, if it tells of one. Any program may answer in its place."""
    try:
        found = json.loads(answer).get("download")
        numbers = [int(found[name]) for name in ("bytes", "total_bytes", "bytes_per_second")]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return Download(*numbers) if all(0 <= number <= _MAX_NUMBER for number in numbers) else None


def downloads_from_hub(spec: TokaDeploymentSpec) -> bool:
    """Whether the model comes from a hub."""
    return spec.model.source.kind == "hf"


def describe_cache(name: str, spec: TokaDeploymentSpec, observed: Observed) -> Json | None:
    """The status of the cache of the TokaDeployment `name`; None if there is nothing to tell."""
    described: Json = {}
    claim = spec.cache.claim_of(name)
    if claim is not None:
        described["claim"] = claim
        phase = (observed.children.get((CLAIM, claim)) or {}).get("status", {}).get("phase")
        if phase:
            described["claimPhase"] = phase
    pods = _current_pods(spec, observed)
    if downloads_from_hub(spec) and _is_cached(spec, pods):
        described["progress"] = DONE
    elif downloads_from_hub(spec) and observed.downloads:
        pod, download = _leading(observed.downloads)
        described |= {
            "progress": str(download),
            "pod": pod,
            "bytes": download.num_bytes,
            "totalBytes": download.total_bytes,
            "bytesPerSecond": download.bytes_per_s,
        }
    return described or None


def explain_cached(spec: TokaDeploymentSpec, observed: Observed) -> tuple[bool, str, str]:
    """Whether the cache has the model, with reason and message. Only for models that come from a hub."""
    pods = _current_pods(spec, observed)
    if _is_cached(spec, pods):
        where = "the pods' own folders" if spec.cache.type == "Ephemeral" else "the shared cache"
        return True, "Cached", f"the model is in {where}"
    if spec.num_wanted == 0:
        return False, "NoPods", "no pods are wanted that would download the model"
    if observed.downloads:
        pod, download = _leading(observed.downloads)
        others = f" ({len(observed.downloads) - 1} more pods download)" if len(observed.downloads) > 1 else ""
        return False, "Downloading", f"pod {pod}: {download}{others}"
    num_loaded = sum(pod.has_served for pod in pods)
    if num_loaded:
        return False, "Downloading", f"{num_loaded} of {len(pods)} pods have the model in their own folders"
    return False, "Waiting", "no pod says that it downloads the model yet"


def explain_claim_conflicts(name: str, spec: TokaDeploymentSpec, observed: Observed) -> Observed:
    """The same, where a pod that cannot start on its node, because the cache's claim is mounted on another, says so."""
    claim = spec.cache.claim_of(name)
    live = observed.children.get((CLAIM, claim or "")) or {}
    modes = (live.get("spec") or {}).get("accessModes") or []
    if claim is None or not modes or not set(modes) <= _ONE_NODE_MODES:
        return observed
    mounted = {pod.node for pod in observed.pods if pod.node and not pod.is_creating}
    pods = tuple(_explain_waiting(pod, claim, modes[0], mounted) for pod in observed.pods)
    return replace(observed, pods=pods)


def _explain_waiting(pod: PodView, claim: str, mode: str, mounted: set[str]) -> PodView:
    if not pod.is_creating or not mounted or pod.node in mounted:
        return pod
    nodes = ", ".join(sorted(mounted))
    message = f"claim {claim} ({mode}) can be mounted by one node at a time: {nodes} has it, the pod is on {pod.node}"
    return replace(pod, failure=Failure(pod.name, "", CLAIM_ON_ONE_NODE, message, since=pod.scheduled_at))


def _current_pods(spec: TokaDeploymentSpec, observed: Observed) -> list[PodView]:
    return [pod for pod in observed.pods if pod.revision == spec.revision and not pod.is_terminating]


def _is_cached(spec: TokaDeploymentSpec, pods: list[PodView]) -> bool:
    """A shared cache has the model once one pod has served it; folders of the pods, once all have."""
    served = [pod.has_served for pod in pods]
    return bool(served) and (all(served) if spec.cache.type == "Ephemeral" else any(served))


def _leading(downloads: Mapping[str, Download]) -> tuple[str, Download]:
    """The pod that has most of the model, and its download."""
    return min(downloads.items(), key=lambda item: (-item[1].num_bytes, item[0]))
