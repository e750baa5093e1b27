"""Which layers each pipeline stage holds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_engine.model.stages import Stage, split_layers

LLAMA_8B_HEAD = 128256 * 4096 / (2 * 4096 * (32 + 8) * 128 + 3 * 4096 * 14336)
LLAMA_1B_HEAD = 128256 * 2048 / (2 * 2048 * (32 + 8) * 64 + 3 * 2048 * 8192)


@pytest.mark.parametrize(
    ("num_layers", "head_layers", "num_stages", "expected"),
    [
        (32, LLAMA_8B_HEAD, 2, (17, 15)),
        (32, LLAMA_8B_HEAD, 4, (9, 9, 8, 6)),
        (16, LLAMA_1B_HEAD, 2, (10, 6)),
        (80, 0.0, 8, (10,) * 8),
        (5, 0.1, 4, (1, 1, 2, 1)),
        (2, 9.0, 2, (1, 1)),
        (7, 1.0, 1, (7,)),
    ],
)
def test_the_head_counts_as_layers(num_layers: int, head_layers: float, num_stages: int, expected: tuple[int]) -> None:
    found = split_layers(num_layers, head_layers, num_stages)
    assert sorted(found[:-1]) == sorted(expected[:-1])
    assert found[-1] == expected[-1]
    assert found[0] == min(found[:-1], default=found[0]), "the first stage holds the embedding, too"


@given(st.integers(1, 8), st.floats(0, 9), st.integers(1, 4))
def test_no_split_has_a_smaller_largest_stage(num_layers: int, head_layers: float, num_stages: int) -> None:
    if num_stages > num_layers:
        return
    found = split_layers(num_layers, head_layers, num_stages)
    assert (len(found), sum(found)) == (num_stages, num_layers)
    assert min(found) >= 1

    def largest(split: tuple[int, ...]) -> float:
        return max(*split[:-1], split[-1] + head_layers) if len(split) > 1 else split[0] + head_layers

    others = itertools.product(range(1, num_layers + 1), repeat=num_stages - 1)
    every = [(*other, num_layers - sum(other)) for other in others if sum(other) < num_layers]
    assert largest(found) == min(map(largest, every))


def test_a_stage_knows_its_layers_and_its_ends() -> None:
    stage = Stage(1, 3, 4, 9)
    assert (list(stage.layers), stage.is_first, stage.is_last) == ([4, 5, 6, 7, 8], False, False)
    whole = Stage.whole(3)
    assert (len(whole.layers), whole.is_first, whole.is_last) == (3, True, True)
