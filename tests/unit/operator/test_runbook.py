"""The runbook in docs/operations.md has every reason that the operator gives, and names tests that exist."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from toka_operator.advice import ADVICE
from toka_operator.errors import EXIT_REASONS

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "operator" / "toka_operator"
MODULES = (
    "autoscaling",
    "canary",
    "conditions",
    "downloads",
    "failures",
    "monitoring",
    "rollback",
    "routing",
    "status",
)
"""The modules that give reasons to conditions."""
REASON = re.compile(r"[A-Z][a-z]+(?:[A-Z][A-Za-z]*)?")
CONDITIONS = {"Ready", "Available", "Progressing", "Degraded", "ConfigValid", "ModelCached"}
CONDITIONS |= {"Monitored", "Routed", "Autoscaled"}
PHASES = {"Invalid", "Running", "Updating", "Starting", "Watched", "Passed", "Failed"}
EVENTS = {"RolloutStarted", "Unavailable", "CanaryPassed"}
WORDS = {
    "AbleToScale", "ScalingActive", "True", "False", "Unknown", "Off", "On", "Known", "NotAllowed", "Rollback", "Hold",
    "Pods", "AverageValue", "Max", "Selector", "Disabled", "Ephemeral", "Percent", "Utilization",
    "ReadWriteOnce", "ReadWriteOncePod", "WaitingRequests", "RunningRequests", "KVCacheUtilization", "Pending", "Auto",
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
    "CreateContainerError", "RunContainerError", "PreStartHookError", "PostStartHookError", "CrashLoopBackOff",
    "CreateContainerConfigError", "ContainerCreating", "PodInitializing", "PodScheduled", "ContainersReady",
    "PodReadyToStartContainers", "DisruptionTarget", "PreemptionByScheduler", "DeletionByTaintManager",
    "DeletionByPodGC", "EvictionByEvictionAPI", "TerminationByKubelet", "FailedScheduling", "Unhealthy", "BackOff",
    "Killing", "FailedCreate", "FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox",
    "OOMKilled", "File", "Memory", "Object", "Resource", "Value", "External", "Recreate", "InPlace", "Surge",
    "Accepted", "ResolvedRefs", "FailClose", "FailOpen", "Gateway", "InferencePool", "HTTPRoute", "PathPrefix",
    "Service", "ReadinessGatesNotReady",
}  # fmt: skip
"""Words of Kubernetes, of engines and of specs that these modules know."""


@dataclass(frozen=True)
class Row:
    """One row of the runbook."""

    reasons: list[str]
    cause: str
    look: str
    cure: str
    run_by: str


def read_rows() -> list[Row]:
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## Runbook\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert {len(each) for each in cells} == {5}
    named = [re.findall(r"`(\w+)`", re.sub(r"\(`\w+`\)", "", each[0])) for each in cells]
    return [Row(names, *each[1:]) for names, each in zip(named, cells, strict=True)]


def find_reasons() -> set[str]:
    """The words in the code that look like reasons, but those that are known to be none."""
    trees = [ast.parse((SOURCES / f"{name}.py").read_text()) for name in MODULES]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    words = {text for text in texts if isinstance(text, str) and REASON.fullmatch(text)}
    exits = {reason for code, reason in EXIT_REASONS.items() if code}
    return (words | exits | ADVICE.keys()) - CONDITIONS - PHASES - EVENTS - WORDS


def test_the_runbook_has_every_reason_once_and_no_other() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## Runbook\n")[1].split("\n## ")[0]
    well = set(
        re.findall(r"`(\w+)`", next(line for line in section.splitlines() if line.startswith("Nothing is wrong")))
    )
    listed = [reason for row in read_rows() for reason in row.reasons]
    assert sorted(set(listed)) == sorted(listed)
    assert {*listed, *well} == find_reasons()


@pytest.mark.parametrize("row", read_rows(), ids=lambda row: row.reasons[0])
def test_a_row_has_a_cause_a_command_a_cure_and_the_test_that_runs_it(row: Row) -> None:
    assert row.cause
    assert row.cure
    assert re.match(r"`kubectl [a-z]", row.look)
    names = re.findall(r"`(test_\w+)`", row.run_by)
    is_nothing_to_do = row.cure.startswith(("wait", "nothing", "what `Degraded` says"))
    assert names or row.run_by == ("-" if is_nothing_to_do else "not run") or row.run_by == "not run"
    sources = [path.read_text() for tier in ("cluster", "e2e") for path in (ROOT / "tests" / tier).glob("test_*.py")]
    for name in names:
        (source,) = [text for text in sources if f"def {name}(" in text]
        assert is_nothing_to_do or any(reason in source for reason in row.reasons)
