"""spec.rollout.canary: the first new pod has traffic for a while and is judged by its engine's own /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cluster.operating import Json, Operator, pod_uids
from tests.cluster.simulated_engines import (
    CANARY_S,
    SimulatedEngines,
    begin,
    canary_of,
    simulate_engines,
    wait_for_phase,
)

BAD = "page_size=32"


@pytest.fixture
def engines(operator: Operator) -> Iterator[SimulatedEngines]:
    with simulate_engines(operator) as running:
        yield running


def test_a_good_canary_passes_with_its_figures_and_only_then_old_pods_go(
    operator: Operator, engines: SimulatedEngines
) -> None:
    old = begin(operator, engines)
    before = pod_uids(operator)
    operator.patch("chat", engine={"pageSize": 64, "port": engines.other_port})
    watched = wait_for_phase(operator, "Watched")
    assert len(watched["before"]) == 3, "the old pods answer at the old port"
    began = time.monotonic()

    def has_moved() -> bool:  # a pass writes the sets, then the status: their pods may show it first
        pods = pod_uids(operator)
        return len(pods) != 3 or not before < pods or canary_of(operator)["phase"] != "Watched"

    operator.wait_for(has_moved, "the rollout to go on")
    assert time.monotonic() - began >= CANARY_S - 2
    passed = wait_for_phase(operator, "Passed")
    assert "with the old pods 0 of" in passed["message"]
    assert "not judged" not in passed["message"]
    status = operator.wait_until_ready("chat")["status"]
    assert status["currentRevision"] != old
    assert status["canary"]["phase"] == "Passed"
    assert before.isdisjoint(pod_uids(operator))
    reasons = {e["reason"] for e in operator.server.list_objects("events", operator.namespace)}
    assert "CanaryPassed" in reasons


@pytest.mark.parametrize("fault", ["errors", "slow"])
def test_a_bad_canary_is_taken_away_and_the_old_pods_stay_until_something_else_is_asked_for(
    operator: Operator, engines: SimulatedEngines, fault: str
) -> None:
    begin(operator, engines)
    before = pod_uids(operator)
    if fault == "errors":
        engines.fails.add(BAD)
    else:
        engines.first_token_s[BAD] = 0.4
    operator.patch("chat", engine={"pageSize": 32})
    told = operator.wait_for_condition("chat", "Degraded", "True", "CanaryFailed")
    figure = "(100.0 %) failed, with the old pods 0 of" if fault == "errors" else "first token after 0.400 s (mean of"
    assert figure in told["message"]
    operator.wait_for(lambda: pod_uids(operator) == before, "the canary to go")
    operator.wait_for_condition("chat", "Progressing", "False", "CanaryFailed")
    operator.wait_for_condition("chat", "Available", "True")
    operator.scale("chat", 3)
    operator.wait_for(lambda: len(pod_uids(operator)) == 3, "a third pod")
    assert len(operator.sets("chat")) == 2
    assert {pod["spec"]["containers"][0]["args"].count(BAD) for pod in operator.pods("chat")} == {0}
    operator.patch("chat", engine={"pageSize": 64})
    wait_for_phase(operator, "Passed")
    operator.wait_until_ready("chat")


def test_a_bad_canary_is_rolled_back_where_that_is_asked_for(operator: Operator, engines: SimulatedEngines) -> None:
    old = begin(operator, engines, replicas=1, onFailure="Rollback")
    before = pod_uids(operator)
    engines.fails.add(BAD)
    operator.patch("chat", engine={"pageSize": 32})
    told = operator.wait_for_condition("chat", "Degraded", "True", "RolledBack")
    assert "CanaryFailed" in told["message"]
    assert "(100.0 %) failed, with the old pods 0 of" in told["message"]
    status = operator.require("td", "chat")["status"]
    assert (status["currentRevision"], status["rollback"]["reason"]) == (old, "CanaryFailed")
    operator.wait_for(lambda: set(operator.sets("chat")) == {old}, "the failed revision to go")
    assert pod_uids(operator) == before
    assert canary_of(operator)["phase"] == "Failed"
    engines.fails.clear()
    operator.patch("chat", rollout={"minReadySeconds": 1})
    assert operator.wait_until_ready("chat")["status"]["currentRevision"] == status["rollback"]["revision"]


def test_without_traffic_it_passes_and_says_so(operator: Operator, engines: SimulatedEngines) -> None:
    begin(operator, engines, replicas=1)
    engines.traffic = False
    operator.patch("chat", engine={"pageSize": 32})
    passed = wait_for_phase(operator, "Passed")
    assert passed["message"].startswith("only 0 requests in")
    operator.wait_until_ready("chat")


def test_another_spec_in_the_middle_is_tried_itself(operator: Operator, engines: SimulatedEngines) -> None:
    begin(operator, engines, canary={"seconds": 10})
    before = pod_uids(operator)
    operator.patch("chat", engine={"pageSize": 32})
    first = wait_for_phase(operator, "Watched")
    operator.patch("chat", engine={"pageSize": 64})

    def second() -> Json | None:
        found = canary_of(operator)
        is_it = found.get("phase") == "Watched" and found["revision"] != first["revision"]
        return found if is_it else None

    tried = operator.wait_for(second, "the second canary")
    assert tried["podUID"] != first["podUID"]
    assert before < pod_uids(operator)
    wait_for_phase(operator, "Passed")
    operator.wait_until_ready("chat")
    assert len(operator.sets("chat")) == 1


def test_a_canary_that_is_deleted_is_tried_anew(operator: Operator, engines: SimulatedEngines) -> None:
    begin(operator, engines, canary={"seconds": 8})
    operator.patch("chat", engine={"pageSize": 64})
    first = wait_for_phase(operator, "Watched")
    operator.delete("pod", first["pod"])

    def again() -> Json | None:
        found = canary_of(operator)
        return found if found.get("phase") == "Watched" and found["podUID"] != first["podUID"] else None

    second = operator.wait_for(again, "another canary")
    assert second["since"] >= first["since"]
    wait_for_phase(operator, "Passed")
    operator.wait_until_ready("chat")
