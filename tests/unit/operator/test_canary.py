"""The canary of a rollout: when there is one, what it is compared with, and what its verdict does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from toka_engine.server.metrics import Metrics
from toka_engine.server.replicas import Replicas
from toka_operator.canary import (
    ANSWERS_WITHIN_S,
    FAILED,
    PASSED,
    WAITING,
    WATCHED,
    Canary,
    describe_canary,
    find_canary,
    find_measured,
    read_canary,
)
from toka_operator.conditions import Outcome
from toka_operator.failures import Failure
from toka_operator.figures import Figures, compare, fails_more, is_slower, parse_figures
from toka_operator.observed import Observed, PodView
from toka_operator.plan import Plan, make_plan
from toka_operator.settings import Settings
from toka_operator.spec import TokaDeploymentSpec
from toka_operator.status import build_status, find_events

from tests.unit.operator.examples import IMAGE, NOW, OWNER, Json, pod, seen, valid

SECONDS = 60
OLD = valid(replicas=2)
SPEC = valid(replicas=2, engine={"pageSize": 32}, rollout={"canary": {"seconds": SECONDS}, "minReadySeconds": 0})


def metrics_text(requests: dict[tuple[str, int], int], first_tokens_s: list[float]) -> bytes:
    """The text that an engine shows at /metrics."""
    metrics = Metrics(lambda: True, lambda: 0, Replicas([lambda message: None], block_tokens=16))
    for (endpoint, status), count in requests.items():
        metrics.requests.labels(endpoint, str(status)).inc(count)
    for seconds in first_tokens_s:
        metrics.first_token_seconds.observe(seconds)
    return metrics.render()


def figures(requests: int, failed: int = 0, first_tokens_s: list[float] | None = None, at: float = NOW) -> Figures:
    counts = {("chat", 200): requests - failed, ("chat", 500): failed}
    found = parse_figures(metrics_text(counts, first_tokens_s or []), at)
    assert found is not None
    return found


def test_the_figures_are_those_that_the_engine_shows() -> None:
    counts = {("chat", 200): 5, ("chat", 499): 7, ("completions", 404): 2, ("chat", 400): 1, ("chat", 503): 3}
    found = parse_figures(metrics_text(counts, [0.03, 0.03, 4.0]), NOW)
    assert found is not None
    assert (found.at, found.requests, found.failed, found.first_tokens) == (NOW, 11, 5, 3)
    assert found.mean_first_token_s == pytest.approx(4.06 / 3)
    assert found.median_bound_s == 0.05


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"toka_requests_total 1\n",
        b"toka_time_to_first_token_seconds_count nan\n",
        b'toka_time_to_first_token_seconds_bucket{le="x"} 1\ntoka_time_to_first_token_seconds_count 1\n',
        b'toka_time_to_first_token_seconds_bucket{le="1"} -1\ntoka_time_to_first_token_seconds_count 1\n',
        b'toka_requests_total{status="200"} inf\n',
        metrics_text({}, [])[: len(metrics_text({}, [])) // 8],
    ],
)
def test_other_programs_answers_are_no_figures(text: bytes) -> None:
    assert parse_figures(text, NOW) is None


@pytest.mark.parametrize(
    ("new", "old", "is_bad"),
    [
        ((9, 9), (100, 0), False),
        ((10, 2), (100, 0), False),
        ((10, 3), (100, 0), True),
        ((100, 4), (100, 0), False),
        ((100, 6), (100, 0), True),
        ((100, 18), (100, 10), False),
        ((100, 21), (100, 10), True),
        ((100, 50), (0, 0), False),
        ((100, 51), (0, 0), True),
        ((100, 51), (9, 9), True),
    ],
)
def test_errors_are_compared_where_they_are_enough(new: tuple[int, int], old: tuple[int, int], is_bad: bool) -> None:
    assert fails_more(figures(*new), figures(*old)) is is_bad


@pytest.mark.parametrize(
    ("new_s", "old_s", "is_bad"),
    [
        ([0.3] * 10, [0.1] * 10, True),
        ([0.3] * 9, [0.1] * 10, False),
        ([0.3] * 10, [0.1] * 9, False),
        ([0.03] * 10, [0.011] * 10, False),
        ([0.1] * 19 + [30.0], [0.1] * 20, False),
        ([0.19] * 10, [0.1] * 10, False),
        ([0.1] * 10, [0.3] * 10, False),
    ],
)
def test_first_tokens_are_compared_on_average_and_in_the_middle(
    new_s: list[float], old_s: list[float], is_bad: bool
) -> None:
    assert is_slower(figures(20, 0, new_s), figures(20, 0, old_s)) is is_bad


def test_the_comparison_names_both_sides() -> None:
    assert compare(figures(50, 20, [0.2] * 10), figures(120, 0, [0.1] * 20)) == (
        "20 of 50 requests (40.0 %) failed, with the old pods 0 of 120 requests (0.0 %); "
        "first token after 0.200 s (mean of 10), with the old pods 0.100 s (mean of 20)"
    )
    assert "none was streamed" in compare(figures(3), figures(0))


@dataclass
class Trial:
    """A rollout of two replicas, its status, and what the engines say when they are asked."""

    spec: TokaDeploymentSpec = SPEC
    wish: str = "wish"
    now: float = NOW
    pods: list[PodView] = field(default_factory=list)
    counted: dict[str, Figures] = field(default_factory=dict)
    status: Json = field(default_factory=dict)
    plan: Plan | None = None
    complete: str = OLD.revision

    def serve(self, revision: str, ordinal: int = 0, requests: int = 0) -> str:
        """Let a pod be available, whose engine answers. Return its uid."""
        view = replace(pod(revision, ordinal, is_available=True), uid=f"{revision}-{ordinal}", address="10.0.0.1")
        self.pods.append(view)
        self.counted[view.uid] = figures(requests)
        return view.uid

    def change(self, uid: str, **changes: Any) -> None:
        self.pods = [replace(p, **changes) if p.uid == uid else p for p in self.pods]

    def count(self, uid: str, *more: Any) -> None:
        """The counts of an engine, all in all."""
        self.counted[uid] = figures(*more)

    def one_pass(self, later_s: float = 0.0) -> Canary | None:
        """Ask, judge, plan and tell."""
        self.now += later_s
        answers = {uid: replace(each, at=self.now) for uid, each in self.counted.items()}
        observed = seen(
            make_plan(OWNER, OLD, Observed({}, (), frozenset()), Settings(IMAGE), self.now), tuple(self.pods)
        )
        observed = replace(observed, complete_revision=self.complete, figures=answers)
        previous = read_canary(self.status)
        canary = find_canary(self.spec, observed, previous, self.wish, self.now)
        asked = find_measured(self.spec, observed, canary, self.now)
        self.asked = {each.uid for each in asked}
        limit = canary.limit if canary is not None else None
        self.plan = make_plan(OWNER, self.spec, observed, Settings(IMAGE), self.now, limit)
        self.former = self.status
        self.status = build_status(
            OWNER, self.spec, observed, self.plan, Outcome(), self.status, self.now, canary=canary
        )
        return canary

    def condition(self, kind: str) -> tuple[str, str, str]:
        (found,) = [c for c in self.status["conditions"] if c["type"] == kind]
        return found["status"], found["reason"], found["message"]

    def windows(self) -> tuple[int, int]:
        """Pods asked for of the old revision and of the new one."""
        assert self.plan is not None
        return self.plan.targets[OLD.revision].replicas, self.plan.targets[self.spec.revision].replicas


def begin() -> tuple[Trial, str]:
    """A trial that is watched. Returns it with the canary's uid."""
    trial = Trial()
    for ordinal in range(2):
        trial.serve(OLD.revision, ordinal, requests=1000)
    waiting = trial.one_pass()
    assert waiting is not None
    assert (waiting.phase, trial.windows()) == (WAITING, (2, 1))
    uid = trial.serve(SPEC.revision)
    watched = trial.one_pass(1)
    assert watched is not None
    assert (watched.phase, trial.windows()) == (WATCHED, (2, 1))
    assert trial.asked == {uid, f"{OLD.revision}-0", f"{OLD.revision}-1"}
    assert trial.condition("Progressing")[:2] == ("True", "CanaryWatched")
    return trial, uid


def test_a_canary_that_is_as_good_as_the_old_pods_passes_after_its_time_and_no_pod_goes_before() -> None:
    trial, uid = begin()
    trial.count(uid, 30, 0, [0.1] * 30)
    for old in range(2):
        trial.count(f"{OLD.revision}-{old}", 1040, 0, [0.1] * 30)
    assert trial.one_pass(SECONDS - 2).phase == WATCHED  # type: ignore[union-attr]
    assert trial.windows() == (2, 1)
    passed = trial.one_pass(3)
    assert passed is not None
    assert (passed.phase, trial.windows()[0], trial.asked) == (PASSED, 1, set())
    assert "0 of 30 requests (0.0 %) failed, with the old pods 0 of 80 requests" in passed.message
    assert "CanaryPassed" in {event.reason for event in find_events(trial.former, trial.status)}
    assert trial.one_pass(10) == passed


def test_a_canary_whose_requests_fail_is_taken_away_before_its_time_is_over_and_the_figures_are_told() -> None:
    trial, uid = begin()
    trial.count(uid, 40, 20)
    trial.count(f"{OLD.revision}-0", 1050)
    failed = trial.one_pass(5)
    assert failed is not None
    assert (failed.phase, trial.windows()) == (FAILED, (2, 0))
    status, reason, message = trial.condition("Degraded")
    assert (status, reason) == ("True", "CanaryFailed")
    assert "20 of 40 requests (50.0 %) failed, with the old pods 0 of 50 requests (0.0 %)" in message
    assert trial.condition("Progressing")[:2] == ("False", "CanaryFailed")
    assert trial.condition("Ready")[:2] == ("False", "CanaryFailed")
    assert trial.condition("Available")[0] == "True"
    trial.pods = trial.pods[:2]
    trial.one_pass(1000)
    assert trial.windows() == (2, 0)
    trial.wish = "another"
    assert trial.one_pass().phase == WAITING  # type: ignore[union-attr]
    assert trial.windows() == (2, 1)


def test_a_canary_whose_first_tokens_come_late_fails_at_the_end_of_its_time() -> None:
    trial, uid = begin()
    trial.count(uid, 30, 0, [0.9] * 30)
    for old in range(2):
        trial.count(f"{OLD.revision}-{old}", 1040, 0, [0.1] * 30)
    assert trial.one_pass(SECONDS - 2).phase == WATCHED  # type: ignore[union-attr]
    failed = trial.one_pass(3)
    assert failed is not None
    assert failed.phase == FAILED
    assert "first token after 0.900 s (mean of 30), with the old pods 0.100 s (mean of 60)" in failed.message


def test_without_traffic_it_passes_and_says_so() -> None:
    trial, _ = begin()
    passed = trial.one_pass(SECONDS + 1)
    assert passed is not None
    assert passed.phase == PASSED
    assert passed.message.startswith("only 0 requests in 61 s, of 10 at least: not judged.")


def test_what_was_counted_before_the_time_began_does_not_count() -> None:
    trial = Trial()
    trial.serve(OLD.revision, 0, requests=1000)
    uid = trial.serve(SPEC.revision)
    trial.count(uid, 100, 100)
    assert trial.one_pass().phase == WATCHED  # type: ignore[union-attr]
    assert trial.one_pass(SECONDS + 1).phase == PASSED  # type: ignore[union-attr]


def test_an_engine_that_ends_under_traffic_is_bad_and_a_pod_that_goes_is_tried_anew() -> None:
    trial, uid = begin()
    trial.change(uid, restarts=1, failure=Failure("chat", "engine", "EngineProcessDied", "the manager died"))
    failed = trial.one_pass(5)
    assert failed is not None
    assert (failed.phase, "EngineProcessDied: the manager died" in failed.message) == (FAILED, True)

    trial, uid = begin()
    trial.change(uid, terminating_until=NOW + 100)
    assert trial.one_pass(5).phase == WAITING  # type: ignore[union-attr]
    trial.pods = trial.pods[:2]
    other = trial.serve(SPEC.revision, 1)
    again = trial.one_pass(5)
    assert again is not None
    assert (again.phase, again.uid, again.since) == (WATCHED, other, trial.now)


def test_a_canary_that_does_not_answer_does_not_pass_and_an_old_pod_that_does_not_is_left_out() -> None:
    trial = Trial()
    first, second = (trial.serve(OLD.revision, ordinal, requests=1000) for ordinal in range(2))
    uid = trial.serve(SPEC.revision)
    trial.change(uid, ready_since=NOW)
    del trial.counted[uid]
    waiting = trial.one_pass(10 * SECONDS)
    assert waiting is not None
    assert (waiting.phase, "does not answer at /metrics" in waiting.message) == (WAITING, True)
    assert uid in trial.asked
    trial.status["lastProgressTime"] = "2027-01-01T00:00:00Z"
    trial.one_pass(1)
    assert "does not answer at /metrics" in trial.condition("Degraded")[2]

    trial.counted[uid] = figures(0)
    trial.change(uid, ready_since=trial.now)
    del trial.counted[second]
    assert trial.one_pass(ANSWERS_WITHIN_S - 1).phase == WAITING  # type: ignore[union-attr]
    watched = trial.one_pass(2)
    assert watched is not None
    assert (watched.phase, watched.before.keys()) == (WATCHED, {uid, first})


def test_another_spec_in_the_middle_is_tried_itself_and_the_first_canary_goes_before_old_pods() -> None:
    trial, _ = begin()
    trial.spec = valid(replicas=2, engine={"pageSize": 64}, rollout={"canary": {"seconds": SECONDS}})
    canary = trial.one_pass()
    assert canary is not None
    assert (canary.revision, canary.phase) == (trial.spec.revision, WAITING)
    assert trial.plan is not None
    assert trial.windows()[0] == 2
    back = replace(trial, spec=OLD, complete=OLD.revision)
    assert back.one_pass() is None
    assert back.plan is not None
    assert back.plan.targets[OLD.revision].replicas == 2


def test_the_state_survives_in_the_status_and_nonsense_there_is_none() -> None:
    trial, _ = begin()
    canary = read_canary(trial.status)
    assert canary is not None
    assert canary.before
    assert {"canary": describe_canary(canary)} == {"canary": trial.status["canary"]}
    for nonsense in ({}, [], "x", {"revision": 1}, {"revision": "x", "phase": "Watched", "before": [{}]}):
        assert read_canary({"canary": nonsense}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"rollout": {"canary": {"seconds": 0}}},
        {"suspend": True, "rollout": {"canary": {"seconds": 60}}},
        {"rollout": {"canary": {"seconds": 60}, "paused": True}},
    ],
)
def test_there_is_none_unless_asked_for_and_wanted(change: Json) -> None:
    trial = Trial(spec=valid(engine={"pageSize": 32}, **change))
    trial.serve(OLD.revision)
    assert trial.one_pass() is None


def test_a_first_rollout_has_no_canary() -> None:
    trial = Trial(complete="")
    assert trial.one_pass() is None
    trial.serve(SPEC.revision)
    assert trial.one_pass() is None
