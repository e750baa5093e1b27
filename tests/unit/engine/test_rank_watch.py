"""Who is blamed when the ranks of a replica stop moving, from made-up beats."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from toka_engine.rank_watch import ENDLESS_BEATS, UNEVEN_BEATS, Blame, Place, RankWatch

Places = dict[str, Place]


def places(*steps: tuple[int, int]) -> Places:
    return {f"model_tp{rank}": Place(*place) for rank, place in enumerate(steps)}


def first_blame(beats: Iterable[Places], is_gpu: bool = False) -> tuple[int, Blame] | None:
    """The number of the first beat that names somebody, from 0, and whom."""
    watch = RankWatch()
    for number, each in enumerate(beats):
        if blame := watch.beat(each, is_gpu):
            return number, blame
    return None


def test_a_rank_that_does_not_begin_a_step_is_named_with_one_that_waits() -> None:
    stuck = places((812, 811), (811, 811))
    assert first_blame([stuck] * 100) == (
        UNEVEN_BEATS,
        Blame("model_tp1", "model_tp1 has not begun step 812; model_tp0 waits for it"),
    )


def test_the_last_of_several_late_ranks_is_named() -> None:
    found = first_blame([places((9, 8), (7, 7), (6, 6), (9, 8))] * 100)
    assert found is not None
    assert found[1] == Blame("model_tp2", "model_tp2 has not begun step 7; model_tp0 waits for it")


def test_a_rank_that_is_stuck_in_a_step_that_another_has_ended_is_named_with_that_one() -> None:
    found = first_blame([places((5, 5), (5, 4))] * 100)
    words = "model_tp1 is in step 5, which model_tp0 has ended: one of them took another branch"
    assert found == (UNEVEN_BEATS, Blame("model_tp1", words))


def test_a_step_that_no_gpu_ends_is_named_and_on_cpus_it_may_take_its_time() -> None:
    stuck = places((5, 4), (5, 4))
    found = first_blame([stuck] * 200, is_gpu=True)
    assert found == (
        ENDLESS_BEATS,
        Blame("model_tp0", "all ranks of model_tp0 are in step 5, and none ends it"),
    )
    assert first_blame([stuck] * 1000) is None


@pytest.mark.parametrize("is_gpu", [True, False])
def test_ranks_that_are_idle_are_not_blamed_however_long(is_gpu: bool) -> None:
    assert first_blame([places((7, 7), (7, 7))] * 10_000, is_gpu) is None


@pytest.mark.parametrize("is_gpu", [True, False])
def test_ranks_that_move_are_not_blamed_whoever_is_behind(is_gpu: bool) -> None:
    behind = [places((step + 3, step), (step, step)) for step in range(500)]
    assert first_blame(behind, is_gpu) is None


def test_a_long_idle_time_does_not_count_when_one_rank_is_a_moment_later() -> None:
    beats = [places((7, 7), (7, 7))] * 1000 + [places((8, 7), (7, 7))] * UNEVEN_BEATS + [places((8, 8), (8, 8))] * 50
    assert first_blame(beats) is None


def test_ranks_that_run_ahead_of_their_gpus_are_compared_by_what_they_began() -> None:
    stuck = places((12, 9), (10, 9))
    assert first_blame([stuck] * 100, is_gpu=True) == (
        UNEVEN_BEATS,
        Blame("model_tp1", "model_tp1 is still in step 10; model_tp0 is in step 12 and waits for it"),
    )
