"""Who is blamed when the ranks of a replica stop moving, from made-up beats."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from toka_engine.rank_watch import ENDLESS_BEATS, UNEVEN_BEATS, Blame, Place, RankWatch, Stages, find_holdup

Places = dict[str, Place]


def places(*steps: tuple[int, int]) -> Places:
    return {f"model_tp{rank}": Place(*place) for rank, place in enumerate(steps)}


def first_blame(beats: Iterable[Places], is_gpu: bool = False) -> tuple[int, Blame] | None:
    """The number of the first beat that names somebody, from 0, and whom."""
    return first_blame_of_stages(([each] for each in beats), is_gpu)


def first_blame_of_stages(beats: Iterable[Stages], is_gpu: bool = False) -> tuple[int, Blame] | None:
    watch = RankWatch()
    for number, each in enumerate(beats):
        if blame := watch.beat(each, is_gpu):
            return number, blame
    return None


def stages(*of_each: list[tuple[int, int]]) -> Stages:
    """The places of the ranks of each stage."""
    return [
        {f"pp{stage}_tp{rank}": Place(*place) for rank, place in enumerate(each)} for stage, each in enumerate(of_each)
    ]


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


def test_a_stage_that_does_not_begin_a_step_is_named_whatever_the_others_wait_for() -> None:
    stuck = stages([(10, 9)], [(7, 7)], [(8, 7)])
    assert first_blame_of_stages([stuck] * 100) == (
        UNEVEN_BEATS,
        Blame("pp1_tp0", "pp1_tp0 has not begun step 8; pp0_tp0 waits for it"),
    )


def test_a_rank_behind_the_others_of_its_stage_is_named_and_not_the_stages_that_wait() -> None:
    stuck = stages([(10, 9), (10, 9)], [(9, 8), (8, 7)])
    found = first_blame_of_stages([stuck] * 100)
    assert found is not None
    assert found[1] == Blame("pp1_tp1", "pp1_tp1 is still in step 8; pp1_tp0 is in step 9 and waits for it")


def test_stages_at_different_steps_are_no_stall_while_one_of_them_computes() -> None:
    """A long step on a CPU: the stages before it wait for its tokens, those behind it for its rows."""
    assert first_blame_of_stages([stages([(9, 8)], [(7, 6)], [(7, 6)])] * 1000) is None
    assert first_blame_of_stages([stages([(9, 9)], [(9, 9)], [(9, 9)])] * 1000, is_gpu=True) is None


@pytest.mark.parametrize(
    ("places_of_stages", "name"),
    [
        (stages([(9, 8)], [(7, 6)], [(7, 6)]), "pp1_tp0"),  # the first waits for tokens, the last for rows
        (stages([(9, 8)], [(9, 8)], [(9, 8)]), "pp0_tp0"),
        (stages([(9, 8)], [(9, 8)], [(6, 5)]), "pp2_tp0"),
        (stages([(9, 9)], [(9, 8)], [(9, 8)]), "pp1_tp0"),
        (stages([(9, 9)], [(9, 9)], [(9, 9)]), None),
    ],
)
def test_the_stage_that_waits_for_no_other_holds_up_all(places_of_stages: Stages, name: str | None) -> None:
    assert find_holdup(places_of_stages) == name
    found = first_blame_of_stages([places_of_stages] * 200, is_gpu=True)
    assert (found and found[1].name) == name


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_whatever_is_in_flight_some_stage_holds_up_the_others(num_stages: int) -> None:
    """Simulated stages that each do what they can; whenever nothing can move but one that is stuck, it is named."""
    for stuck_at in range(num_stages):
        begun, done = [0] * num_stages, [0] * num_stages
        for _ in range(200):
            for stage in range(num_stages):
                if done[stage] == begun[stage] and begun[stage] < done[-1] + num_stages + 2:
                    begun[stage] += 1
                has_input = done[stage - 1] >= begun[stage] if stage else done[-1] >= begun[0] - num_stages
                if done[stage] < begun[stage] and has_input and not (stage == stuck_at and done[stage] == 20):
                    done[stage] += 1
        places_of_stages = stages(*([place] for place in zip(begun, done, strict=True)))
        assert find_holdup(places_of_stages) == f"pp{stuck_at}_tp0"
