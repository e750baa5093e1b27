"""`kubectl toka status`: a TokaDeployment, its conditions, revisions and pods, as a tree with causes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kubectl_toka.names import ENGINE_CONTAINER, REVISION_LABEL

Json = dict[str, Any]
_GOOD_IF_FALSE = ("Degraded", "Progressing")
_MAX_WORDS = 300


@dataclass
class Node:
    """A line and what belongs to it."""

    text: str
    children: list[Node] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        """The tree as lines, drawn with boxes."""
        yield self.text
        for number, child in enumerate(self.children):
            is_last = number == len(self.children) - 1
            first, *rest = child.lines()
            yield ("└── " if is_last else "├── ") + first
            yield from (("    " if is_last else "│   ") + line for line in rest)


def make_tree(deployment: Json, pods: Sequence[Json]) -> Node:
    """The tree of one TokaDeployment and its engine pods."""
    status, spec = deployment.get("status") or {}, deployment["spec"]
    metadata = deployment["metadata"]
    is_seen = status.get("observedGeneration") == metadata.get("generation")
    head = f"{metadata['namespace']}/{metadata['name']}  {status.get('phase', 'Unknown')}"
    head += f"  {status.get('ready', '?')} ready  {spec['model']['source']}"
    root = Node(head if is_seen else head + "  (the operator has not seen this spec yet)")
    root.children += [Node(_describe_condition(c)) for c in status.get("conditions") or [] if _is_told(c)]
    if url := status.get("url"):
        root.children.append(Node(f"url {url}"))
    cache = status.get("cache") or {}
    if cache:
        claim = f"claim {cache['claim']} {cache.get('claimPhase', '')}" if "claim" in cache else "of each pod"
        root.children.append(Node(f"cache {claim.rstrip()}  {cache.get('progress', '')}".rstrip()))
    failures = {failure["pod"]: failure for failure in status.get("failures") or []}
    current = status.get("currentRevision", "")
    by_revision: dict[str, list[Json]] = {current: []} if current else {}
    for pod in pods:
        by_revision.setdefault((pod["metadata"].get("labels") or {}).get(REVISION_LABEL, "?"), []).append(pod)
    for revision, members in sorted(by_revision.items(), key=lambda item: (item[0] != current, item[0])):
        root.children.append(_describe_revision(revision, revision == current, members, failures))
    missing = failures.keys() - {pod["metadata"]["name"] for pod in pods}
    root.children += [Node(f"not made: {name}  {_describe_failure(failures[name])}") for name in sorted(missing)]
    return root


def _is_told(condition: Json) -> bool:
    """Whether a condition is worth a line: how it is ready, and whatever is not as it should be."""
    is_good = condition["status"] == ("False" if condition["type"] in _GOOD_IF_FALSE else "True")
    return not is_good or condition["type"] == "Ready"


def _describe_condition(condition: Json) -> str:
    word = condition["type"] if condition["status"] == "True" else f"not {condition['type']}"
    return f"{word}: {condition['reason']}: {_cut(condition.get('message', ''))}".rstrip(": ")


def _describe_revision(revision: str, is_current: bool, pods: Sequence[Json], failures: dict[str, Json]) -> Node:
    num_ready = sum(_is_ready(pod) for pod in pods)
    images = sorted({_image(pod) for pod in pods})
    text = f"revision {revision}{' (current)' if is_current else ''}  {num_ready}/{len(pods)} ready  {' '.join(images)}"
    ordered = sorted(pods, key=lambda pod: (len(pod["metadata"]["name"]), pod["metadata"]["name"]))
    return Node(text.rstrip(), [_describe_pod(pod, failures) for pod in ordered])


def _describe_pod(pod: Json, failures: dict[str, Json]) -> Node:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    state = "ready" if _is_ready(pod) else status.get("phase", "Unknown").lower()
    if pod["metadata"].get("deletionTimestamp"):
        state = "going"
    elif state == "running":
        state = "not ready"
    engine: Json = next((c for c in status.get("containerStatuses") or [] if c["name"] == ENGINE_CONTAINER), {})
    parts = [f"pod {name}", state, pod["spec"].get("nodeName") or "no node"]
    if engine.get("restartCount"):
        parts.append(f"{engine['restartCount']} restarts")
    node = Node("  ".join(parts))
    if name in failures:
        node.children.append(Node(_describe_failure(failures[name])))
    return node


def _describe_failure(failure: Json) -> str:
    code = f" (exit code {failure['exitCode']})" if "exitCode" in failure else ""
    return f"{failure['reason']}{code}: {_cut(failure.get('message', ''))}"


def _is_ready(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _image(pod: Json) -> str:
    return next((str(c["image"]) for c in pod["spec"]["containers"] if c["name"] == ENGINE_CONTAINER), "")


def _cut(text: str) -> str:
    """One line, of a length that a terminal bears."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_WORDS else line[: _MAX_WORDS - 3] + "..."
