"""The rollout's budgets: single decisions. Any order of events: test_rollout_in_any_order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_operator.rollout import Budgets, RevisionPods, Window, decide_windows, find_moves


def pods(
    replicas: int, available: int = 0, unrecoverable: int = 0, draining: int = 0, served: int | None = None
) -> RevisionPods:
    """The lowest ordinals are available (and `served`, if not said otherwise), the highest unrecoverable."""
    return RevisionPods(
        Window(0, replicas),
        available=frozenset(range(available)),
        served=frozenset(range(available if served is None else served)),
        unrecoverable=frozenset(range(replicas - unrecoverable, replicas)),
        num_draining=draining,
    )


def states(word: str, start: int = 0, leaving: frozenset[int] = frozenset()) -> RevisionPods:
    """One pod a letter: a available, s and u unready after it served (s for long), n failing before it ever served,
    . starting, x leaving, d available and on a cordoned node."""

    def where(letters: str) -> frozenset[int]:
        return frozenset(start + n for n, letter in enumerate(word) if letter in letters)

    window = Window(start, len(word))
    leaving = where("x") | leaving
    return RevisionPods(window, where("ad"), where("adsu"), where("sn"), leaving=leaving, displaced=where("d"))


def decide(budgets: Budgets, current: str, revisions: dict[str, RevisionPods]) -> dict[str, int]:
    """The number of pods that each revision gets."""
    return {name: window.replicas for name, window in decide_windows(budgets, current, revisions).items()}


def test_the_first_revision_comes_up_at_once() -> None:
    assert decide(Budgets(3, 1, 0), "a", {}) == {"a": 3}


def test_a_new_revision_comes_up_by_max_surge_before_an_old_pod_goes() -> None:
    assert decide(Budgets(3, 1, 0), "b", {"a": pods(3, 3)}) == {"a": 3, "b": 1}


def test_an_old_pod_goes_once_a_new_one_is_available() -> None:
    both = {"a": pods(3, 3), "b": pods(1, 1)}
    assert decide(Budgets(3, 1, 0), "b", both) == {"a": 2, "b": 1}


def test_a_pod_that_drains_still_counts_as_surge() -> None:
    both = {"a": pods(2, 2, draining=1), "b": pods(1, 1)}
    assert decide(Budgets(3, 1, 0), "b", both) == {"a": 2, "b": 1}


def test_without_surge_an_old_pod_goes_first() -> None:
    assert decide(Budgets(2, 0, 1), "b", {"a": pods(2, 2)}) == {"a": 1, "b": 0}
    assert decide(Budgets(2, 0, 1), "b", {"a": pods(1, 1), "b": pods(0)}) == {"a": 1, "b": 1}


def test_a_third_revision_replaces_the_second_before_the_first() -> None:
    both = {"a": pods(2, 2), "b": pods(1)}
    assert decide(Budgets(2, 1, 0), "c", both)["b"] == 0
    assert decide(Budgets(2, 1, 0), "c", both)["a"] == 2


def test_of_two_old_revisions_that_serve_the_older_goes_first() -> None:
    three = {"z": pods(1, 1), "a": pods(1, 1), "c": pods(1, 1)}
    assert decide(Budgets(2, 1, 0), "c", three) == {"z": 0, "a": 1, "c": 1}


def test_going_back_scales_the_old_revision_up_again() -> None:
    both = {"a": pods(1, 1), "b": pods(2, 1)}
    assert decide(Budgets(2, 1, 0), "a", both) == {"a": 1, "b": 1}
    assert decide(Budgets(2, 1, 0), "a", {"a": pods(1, 1), "b": pods(1, 1)}) == {"a": 2, "b": 1}


def test_an_old_pod_that_restarts_is_kept_until_a_new_one_serves_in_its_place() -> None:
    both = {"a": pods(2, 1), "b": pods(1, 0)}
    assert decide(Budgets(2, 1, 0), "b", both) == {"a": 2, "b": 1}
    assert decide(Budgets(2, 1, 0), "b", {"a": pods(2, 1), "b": pods(1, 1)})["a"] == 1


def test_old_pods_that_never_come_up_are_taken_away_at_once() -> None:
    both = {"a": pods(2, 0, unrecoverable=2)}
    assert decide(Budgets(2, 1, 0), "b", both)["a"] == 0


@pytest.mark.parametrize("old", ["sss", "ass", "aas", "suu", "sas"])
def test_old_pods_that_served_outlive_a_new_revision_that_never_does(old: str) -> None:
    """They may come back; the room that they free is all that the new revision gets."""
    for new in ("", ".", "n", "nn", "nnn"):
        assert decide(Budgets(3, 1, 0), "b", {"a": states(old), "b": states(new)})["a"] == 3
    assert decide(Budgets(1, 1, 0), "b", {"a": states("s"), "b": states("n")})["a"] == 1


def test_a_stuck_old_pod_that_served_frees_room_and_goes_once_a_new_one_is_available() -> None:
    assert decide(Budgets(3, 1, 0), "b", {"a": states("ass"), "b": states(".")}) == {"a": 3, "b": 3}
    assert decide_windows(Budgets(3, 1, 0), "b", {"a": states("ass"), "b": states("a..")})["a"] == Window(0, 2)


def test_a_dead_old_pod_below_an_available_one_blocks_nothing() -> None:
    both = {"a": states("naa"), "b": states("a")}
    assert decide_windows(Budgets(3, 1, 0), "b", both) == {"a": Window(1, 2), "b": Window(0, 2)}


def test_nothing_is_desired_while_suspended() -> None:
    assert decide(Budgets(0, 1, 0), "b", {"a": pods(3, 3)}) == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    ("seen", "desired", "kept"),
    [
        ("sa", 1, Window(1, 1)),
        ("as", 1, Window(0, 1)),
        (".a.", 1, Window(1, 1)),
        ("asa", 1, Window(2, 1)),
        ("aaa", 1, Window(2, 1)),
        ("asa", 2, Window(0, 3)),
        ("a.a", 2, Window(0, 3)),
        ("aan", 2, Window(0, 2)),
        ("naa", 2, Window(1, 2)),
        ("s.", 1, Window(0, 1)),
        (".n", 1, Window(0, 1)),
        ("saas", 2, Window(1, 2)),
    ],
)
def test_scaling_down_takes_the_pods_that_do_not_serve_first(seen: str, desired: int, kept: Window) -> None:
    assert decide_windows(Budgets(desired, 1, 0), "a", {"a": states(seen)})["a"] == kept


def test_a_pod_that_leaves_is_replaced_under_another_name_at_once() -> None:
    budgets = Budgets(2, 1, 0)
    assert decide_windows(budgets, "a", {"a": states("xa")}) == {"a": Window(1, 2)}
    assert decide_windows(budgets, "a", {"a": states("a", 1, leaving=frozenset({0}))}) == {"a": Window(1, 2)}
    assert decide_windows(budgets, "a", {"a": states("ax", 3)}) == {"a": Window(2, 2)}
    assert decide_windows(budgets, "a", {"a": states("ax")}) == {"a": Window(0, 2)}, "both other names are not free"
    assert decide_windows(budgets, "a", {"a": states("", leaving=frozenset({0, 1}))}) == {"a": Window(2, 2)}
    assert decide_windows(budgets, "a", {"a": states("", 2)}) == {"a": Window(0, 2)}, "no name is taken"


def test_a_paused_rollout_keeps_what_is_there() -> None:
    both = {"a": pods(2, 2), "b": pods(1, 1)}
    assert decide(Budgets(2, 1, 0, is_paused=True), "b", both) == {"a": 2, "b": 1}
    assert decide(Budgets(2, 1, 0, is_paused=True), "a", {}) == {}


def test_a_paused_rollout_still_scales() -> None:
    both = {"a": pods(2, 2), "b": pods(1, 1)}
    assert decide(Budgets(5, 1, 0, is_paused=True), "b", both) == {"a": 4, "b": 1}
    assert sum(decide(Budgets(1, 1, 0, is_paused=True), "b", both).values()) == 2


def test_paused_a_pod_that_served_outlives_one_that_never_did() -> None:
    both = {"a": states("su"), "b": states("..")}
    assert decide(Budgets(1, 1, 0, is_paused=True), "b", both) == {"a": 2, "b": 0}


@pytest.mark.parametrize("surge", [1, 5])
@pytest.mark.parametrize("current", ["a", "b"])
def test_paused_with_one_revision_there_are_exactly_as_many_pods_as_desired(surge: int, current: str) -> None:
    assert decide(Budgets(1, surge, 0, is_paused=True), current, {"a": pods(3, 3)}) == {"a": 1}
    assert decide(Budgets(5, surge, 0, is_paused=True), current, {"a": pods(3, 3)}) == {"a": 5}


def test_growth_during_a_rollout_goes_to_the_revision_that_serves() -> None:
    assert decide(Budgets(6, 1, 0), "b", {"a": states("aaa"), "b": states("n")}) == {"a": 6, "b": 1}
    assert decide(Budgets(6, 1, 0), "b", {"a": states("aaa"), "b": states(".nnn")}) == {"a": 6, "b": 1}
    assert decide(Budgets(6, 1, 0), "b", {"a": states("aaa"), "b": states("a")}) == {"a": 3, "b": 4}
    assert decide(Budgets(6, 1, 0), "b", {"a": states("aaa"), "b": states("u")}) == {"a": 3, "b": 4}
    assert decide(Budgets(6, 1, 0), "b", {"a": states("uuu"), "b": states("n")}) == {"a": 3, "b": 4}
    draining = {"a": pods(3, 3, draining=2), "b": states("n")}
    assert decide(Budgets(6, 1, 0), "b", draining) == {"a": 4, "b": 1}, "no more than the surge allows"


def test_an_old_pod_that_is_evicted_comes_back_while_the_new_revision_does_not_serve() -> None:
    both = {"a": states("xaa"), "b": states("n")}
    assert decide_windows(Budgets(3, 1, 0), "b", both) == {"a": Window(1, 3), "b": Window(0, 1)}


@pytest.mark.parametrize("num_desired", [1, 2, 5])
def test_a_decision_is_stable_once_the_rollout_is_over(num_desired: int) -> None:
    done = {"b": pods(num_desired, num_desired)}
    assert decide(Budgets(num_desired, 1, 0), "b", done) == {"b": num_desired}


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.text("asu", min_size=6, max_size=6))
def test_a_rollout_whose_new_pods_never_come_up_keeps_the_old_ones(
    num_desired: int, surge: int, down: int, word: str
) -> None:
    budgets = Budgets(num_desired, surge if surge + down else 1, down)
    old, new = word[:num_desired], ""
    for _ in range(20):
        windows = decide_windows(budgets, "b", {"a": states(old), "b": states(new)})
        old = "".join(old[ordinal] for ordinal in windows["a"])
        new = "n" * windows["b"].replicas
        assert len(old) >= budgets.min_available


@pytest.mark.parametrize(
    ("seen", "desired", "becomes"),
    [
        ("d", 1, Window(0, 2)),
        ("d.", 1, Window(0, 2)),
        ("da", 1, Window(1, 1)),
        ("dda", 2, Window(1, 3)),
        ("ada", 3, Window(0, 4)),
        ("adaa", 3, Window(0, 4)),
        ("axaa", 3, Window(0, 4)),
        ("ad.", 3, Window(0, 4)),
        ("dn", 1, Window(0, 2)),
    ],
)
def test_a_pod_on_a_cordoned_node_goes_once_another_serves_in_its_place(
    seen: str, desired: int, becomes: Window
) -> None:
    for is_paused in (False, True):
        budgets = Budgets(desired, 1, 0, is_paused)
        assert decide_windows(budgets, "a", {"a": states(seen)})["a"] == becomes


def test_a_pod_between_two_that_serve_is_deleted_when_it_is_to_leave_its_node() -> None:
    def moves(seen: str) -> list[tuple[str, int]]:
        view = {"a": states(seen)}
        return find_moves(Budgets(3, 1, 0), "a", view, decide_windows(Budgets(3, 1, 0), "a", view))

    assert moves("ada") == moves("ada.") == moves("axaa") == []
    assert moves("adaa") == [("a", 1)]
    assert find_moves(Budgets(3, 2, 0), "a", {"a": states("addaa")}, {"a": Window(0, 5)}) == [("a", 1)]


def test_without_surge_a_cordoned_nodes_pods_wait_for_their_eviction() -> None:
    assert decide_windows(Budgets(2, 0, 1), "a", {"a": states("ad")})["a"] == Window(0, 2)


def test_of_old_pods_those_on_a_cordoned_node_go_first() -> None:
    both = {"a": states("ad"), "b": states("a")}
    assert decide_windows(Budgets(2, 1, 0), "b", both)["a"] == Window(0, 1)
