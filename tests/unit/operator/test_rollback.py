"""Going back from a rollout that fails: when, to what, and until when."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toka_operator.conditions import Condition, Outcome
from toka_operator.observed import Observed
from toka_operator.plan import Plan, make_plan
from toka_operator.resources import POD_DISRUPTION_BUDGET
from toka_operator.revisions import with_stored_revision
from toka_operator.rollback import Resort, find_resort, give_up
from toka_operator.settings import SPEC_ANNOTATION, Settings
from toka_operator.spec import TokaDeploymentSpec, parse
from toka_operator.status import build_status
from toka_operator.times import format_time

from tests.unit.operator.examples import IMAGE, NOW, OWNER, Json, body, child, engine_status, live, pod, valid

DEADLINE_S = 2000.0
ROLLBACK = {"onFailure": "Rollback", "progressDeadlineSeconds": int(DEADLINE_S)}


@dataclass
class Object:
    """A TokaDeployment, its children and its status, over many passes. Pods of a revision in `works` are available at
    once, others never; a pod that is not asked for is gone at once."""

    spec: Json
    now: float = NOW
    works: set[int] = field(default_factory=lambda: {16})
    """Page sizes with which an engine comes up."""
    generation: int = 1
    status: Json = field(default_factory=dict)
    children: dict[tuple[str, str], Json] = field(default_factory=dict)

    def change(self, **spec: Any) -> None:
        """Another spec, which the operator sees at once."""
        self.spec = {**self.spec, **spec}
        self.generation += 1
        self.one_pass()

    def one_pass(self) -> Plan:
        """Plan and report, in the order of `Reconciler`."""
        owner = replace(OWNER, generation=self.generation)
        whole = {**body(**self.spec), "status": self.status}
        spec = parse(whole)
        assert isinstance(spec, TokaDeploymentSpec), spec
        seen = self.observe()
        spec = with_stored_revision(owner, spec, seen)
        resort = find_resort(owner, whole, spec, seen)
        spec = resort.spec if resort.failed is not None and resort.spec is not None else spec
        plan = make_plan(owner, spec, seen, Settings(IMAGE), self.now)
        self.status = build_status(owner, spec, seen, plan, Outcome(), self.status, self.now, resort)
        gone = {(kind, name) for kind, name, _ in plan.deletions}
        self.children = {key: each for key, each in self.children.items() if key not in gone}
        for each in plan.desired:
            key = (each["kind"], each["metadata"]["name"])
            before = self.children.get(key, {}).get("metadata", {}).get("annotations", {})
            written = live(each)
            if before or "annotations" in written["metadata"]:
                written["metadata"]["annotations"] = {**before, **written["metadata"].get("annotations", {})}
            if each["kind"] == "StatefulSet":
                written["status"] = {"observedGeneration": 1, "replicas": each["spec"]["replicas"]}
            self.children[key] = written
        return plan

    def observe(self) -> Observed:
        pods = []
        for (kind, name), each in self.children.items():
            if kind != "StatefulSet":
                continue
            revision = name.removeprefix("chat-")
            arguments = each["spec"]["template"]["spec"]["containers"][0]["args"]
            size = next((int(a.split("=")[1]) for a in arguments if a.startswith("page_size=")), 16)
            start = each["spec"]["ordinals"]["start"]
            for ordinal in range(start, start + each["spec"]["replicas"]):
                view = pod(revision, ordinal, is_available=size in self.works)
                pods.append(replace(view, ready_since=NOW - 100.0) if view.is_ready else view)
        complete = self.status.get("completeRevision", "")
        return Observed(dict(self.children), tuple(pods), frozenset(), complete_revision=complete)

    def settle(self) -> None:
        """Passes until nothing changes any more."""
        for _ in range(30):
            before = (self.status, self.children)
            self.one_pass()
            if before == (self.status, self.children):
                return
        raise AssertionError("it never settles")

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    def page_sizes(self) -> set[int]:
        """Those of the pods that there are."""
        seen = self.observe()
        names = {f"chat-{each.revision}" for each in seen.pods}
        sets = [each for (kind, name), each in self.children.items() if kind == "StatefulSet" and name in names]
        found = [a for s in sets for a in s["spec"]["template"]["spec"]["containers"][0]["args"]]
        sizes = {int(a.split("=")[1]) for a in found if a.startswith("page_size=")}
        return sizes or {16}

    def reason(self, kind: str) -> tuple[str, str]:
        (found,) = [c for c in self.status["conditions"] if c["type"] == kind]
        return found["status"], found["reason"]


def begin(**rollout: Any) -> Object:
    chat = Object({"replicas": 3, "engine": {"pageSize": 16}, "rollout": {**ROLLBACK, **rollout}})
    chat.settle()
    assert chat.reason("Ready") == ("True", "AllAvailable")
    return chat


def test_a_rollout_that_makes_no_progress_goes_back_once_its_deadline_is_over() -> None:
    chat = begin()
    first = chat.status["currentRevision"]
    chat.change(engine={"pageSize": 32})
    chat.wait(DEADLINE_S - 1)
    assert chat.page_sizes() == {16, 32}
    chat.wait(2)
    assert chat.page_sizes() == {16}
    assert chat.status["currentRevision"] == chat.status["completeRevision"] == first
    assert chat.reason("Ready") == ("False", "RolledBack")
    assert chat.reason("Degraded") == ("True", "RolledBack")
    assert chat.reason("Progressing") == ("False", "RolledBack")
    assert chat.reason("Available") == ("True", "MinimumAvailable")
    assert chat.status["rollback"]["reason"] == "ProgressDeadlineExceeded"
    assert chat.status["phase"] == "Degraded"


def test_it_stays_back_while_the_number_changes_and_time_goes_by() -> None:
    chat = begin()
    chat.change(engine={"pageSize": 32})
    chat.wait(DEADLINE_S + 1)
    for replicas in (5, 1, 4):
        chat.change(replicas=replicas)
        chat.wait(3 * DEADLINE_S)
        assert chat.page_sizes() == {16}
        assert chat.status["availableReplicas"] == replicas
        assert chat.reason("Degraded") == ("True", "RolledBack")


def test_another_change_is_tried_again_and_so_is_the_same_one_after_another() -> None:
    chat = begin()
    chat.change(engine={"pageSize": 32})
    chat.wait(DEADLINE_S + 1)
    chat.works = {16, 64}
    chat.change(engine={"pageSize": 64})
    chat.settle()
    assert chat.reason("Ready") == ("True", "AllAvailable")
    assert "rollback" not in chat.status
    chat.works = {32, 64}
    chat.change(engine={"pageSize": 32})
    chat.settle()
    assert chat.reason("Ready") == ("True", "AllAvailable")
    assert chat.page_sizes() == {32}


def test_a_change_of_rollout_tries_the_same_pods_again_and_hold_keeps_them() -> None:
    chat = begin()
    chat.change(engine={"pageSize": 32})
    chat.wait(DEADLINE_S + 1)
    chat.change(rollout={**ROLLBACK, "onFailure": "Hold"})
    chat.wait(3 * DEADLINE_S)
    assert chat.page_sizes() == {16, 32}
    assert chat.reason("Degraded") == ("True", "ProgressDeadlineExceeded")
    assert "rollback" not in chat.status


def test_a_claim_does_not_shrink_on_the_way_back_and_patience_is_as_it_was_last_asked_for() -> None:
    chat = begin()
    cache = {"type": "SharedPVC", "size": "10Gi"}
    model = {"source": "hf://org/name"}
    chat.change(model=model, cache=cache, scheduling={"patienceSeconds": 300})
    chat.settle()
    assert chat.reason("Ready") == ("True", "AllAvailable")
    chat.change(engine={"pageSize": 32}, cache={**cache, "size": "20Gi"}, scheduling={"patienceSeconds": 30})
    chat.wait(DEADLINE_S + 1)
    assert chat.page_sizes() == {16}
    spec = parse({**body(**chat.spec), "status": chat.status})
    assert isinstance(spec, TokaDeploymentSpec)
    resort = find_resort(OWNER, {**body(**chat.spec), "status": chat.status}, spec, chat.observe())
    assert resort.failed is not None
    assert resort.spec is not None
    assert (resort.spec.cache.size, resort.spec.scheduling.patience_s) == ("20Gi", 30)


def test_without_a_complete_revision_or_its_memory_nothing_goes_back() -> None:
    chat = Object({"engine": {"pageSize": 32}, "rollout": ROLLBACK})
    chat.wait(0)
    chat.wait(DEADLINE_S + 1)
    assert chat.reason("Degraded") == ("True", "ProgressDeadlineExceeded")
    assert "rollback" not in chat.status
    chat = begin(revisionHistoryLimit=0)
    first = chat.status["currentRevision"]
    chat.change(engine={"pageSize": 32}, rollout={**ROLLBACK, "maxUnavailable": 3, "revisionHistoryLimit": 0})
    chat.settle()
    assert chat.page_sizes() == {32}
    assert ("ControllerRevision", f"chat-{first}") in chat.children, "it is kept, whatever the history's limit"
    chat.wait(DEADLINE_S + 1)
    assert chat.page_sizes() == {16}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"engine": 3}', '{"model": null, "rollout": []}'])
def test_a_revision_whose_memory_somebody_wrote_over_is_not_gone_back_to(text: str) -> None:
    chat = begin()
    first = chat.status["currentRevision"]
    chat.children["ControllerRevision", f"chat-{first}"]["metadata"]["annotations"][SPEC_ANNOTATION] = text
    chat.change(engine={"pageSize": 32})
    chat.wait(DEADLINE_S + 1)
    assert chat.reason("Degraded") == ("True", "ProgressDeadlineExceeded")
    assert "rollback" not in chat.status
    assert chat.page_sizes() == {16, 32}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([16, 32, 64]).map(lambda size: {"engine": {"pageSize": size}}),
            st.integers(1, 4).map(lambda replicas: {"replicas": replicas}),
            st.sampled_from(["Hold", "Rollback"]).map(lambda word: {"rollout": {**ROLLBACK, "onFailure": word}}),
            st.sampled_from([1.0, DEADLINE_S + 1]),
            st.sets(st.sampled_from([16, 32, 64])).map(frozenset),
        ),
        max_size=12,
    )
)
def test_in_any_order_it_ends_with_what_is_asked_for_or_back_at_what_was_complete(steps: list[Any]) -> None:
    chat = begin()
    for step in steps:
        if isinstance(step, float):
            chat.wait(step)
        elif isinstance(step, frozenset):
            chat.works = {16, *step}
        else:
            chat.change(**step)
    chat.settle()
    chat.wait(DEADLINE_S + 1)
    chat.wait(DEADLINE_S + 1)
    asked = chat.spec["engine"]["pageSize"]
    if "rollback" in chat.status:
        assert chat.spec["rollout"]["onFailure"] == "Rollback"
        assert chat.status["currentRevision"] == chat.status["completeRevision"] != chat.status["rollback"]["revision"]
        assert asked not in chat.page_sizes()
    else:
        assert asked in chat.page_sizes()
        assert chat.reason("Ready")[0] == ("True" if asked in chat.works else "False")


def test_the_cause_is_told_though_the_engine_runs_again_at_that_moment() -> None:
    old, new = valid(), valid(engine={"pageSize": 32}, rollout=ROLLBACK)
    running = {"restartCount": 3, "state": {"running": {"startedAt": format_time(NOW - 1)}}}
    ended = {"terminated": {"exitCode": 2, "message": "no_such_key: unknown", "finishedAt": format_time(NOW - 9)}}
    since = {"type": "Ready", "status": "False", "lastTransitionTime": format_time(NOW - 900)}
    crashing = pod(new.revision, 0, {**engine_status(**running, lastState=ended), "conditions": [since]})
    late = Condition("Degraded", True, "ProgressDeadlineExceeded", "no progress")
    entry = give_up(Resort("w", old), new, Observed({}, (crashing,), frozenset()), late, NOW)
    assert entry is not None
    assert entry["reason"] == "ConfigInvalid"
    assert "no_such_key" in entry["message"]
    assert give_up(Resort("w"), new, Observed({}, (crashing,), frozenset()), late, NOW) is None


def test_the_budget_follows_the_number_while_it_is_back() -> None:
    chat = begin()
    chat.change(engine={"pageSize": 32}, replicas=4)
    chat.wait(DEADLINE_S + 1)
    assert child(chat.one_pass(), POD_DISRUPTION_BUDGET)["spec"]["minAvailable"] == 3
