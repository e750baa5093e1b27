"""The guess of what a replica's cache holds: blocks named by content, kept by recent use."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from toka_engine.server.prefix_index import BLOCK_TOKENS, PrefixHasher, PrefixIndex

from tests.unit.server.replicas import prompt_of

_HASHER = PrefixHasher(page_size=16)


@pytest.mark.parametrize(("page_size", "expected"), [(1, 64), (16, 64), (48, 96), (64, 64), (128, 128), (1024, 1024)])
def test_a_block_is_of_whole_pages_and_of_64_tokens_at_least(page_size: int, expected: int) -> None:
    assert PrefixHasher(page_size).block_tokens == expected
    assert expected % page_size == 0


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 0), (63, 0), (64, 0), (65, 1), (128, 1), (129, 2)])
def test_a_block_counts_where_a_token_follows_it(num_tokens: int, num_blocks: int) -> None:
    assert len(_HASHER.hash_blocks(prompt_of(num_tokens))) == num_blocks


@given(st.integers(0, 5 * BLOCK_TOKENS - 1))
def test_prompts_share_the_blocks_before_their_first_difference(place: int) -> None:
    prompt = prompt_of(5 * BLOCK_TOKENS + 1)
    other = prompt.copy()
    other[place] += 1
    same = [a == b for a, b in zip(_HASHER.hash_blocks(prompt), _HASHER.hash_blocks(other), strict=True)]
    assert same == [block < place // BLOCK_TOKENS for block in range(5)]


def test_equal_blocks_at_other_places_are_other_blocks() -> None:
    hashes = _HASHER.hash_blocks(np.zeros(4 * BLOCK_TOKENS + 1, np.int32))
    assert len(set(hashes)) == 4


def test_hashes_do_not_depend_on_how_the_ids_lie_in_memory_and_differ_between_processes() -> None:
    wide = prompt_of(200).astype(np.int64)
    assert _HASHER.hash_blocks(wide[::1]) == _HASHER.hash_blocks(prompt_of(200))
    assert _HASHER.hash_blocks(np.repeat(prompt_of(200), 2)[::2]) == _HASHER.hash_blocks(prompt_of(200))
    assert PrefixHasher(16).hash_blocks(prompt_of(200)) != _HASHER.hash_blocks(prompt_of(200))


class _Model:
    """The index, written as plainly as possible: (last use, block), oldest first."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.used: list[bytes] = []

    def add(self, blocks: list[bytes]) -> None:
        self.used = [block for block in self.used if block not in blocks] + blocks[::-1]
        self.used = self.used[max(0, len(self.used) - self.max_blocks) :]


_PROMPTS = st.lists(st.integers(0, 2), max_size=4).map(
    lambda path: [bytes(path[: depth + 1]) for depth in range(len(path))]
)


@given(st.integers(0, 12), st.lists(_PROMPTS, max_size=40))
def test_the_index_holds_what_was_used_last_and_no_block_without_those_before_it(
    max_blocks: int, prompts: list[list[bytes]]
) -> None:
    index, model = PrefixIndex(max_blocks), _Model(max_blocks)
    for blocks in prompts:
        index.add(blocks)
        model.add(blocks)
        assert len(index) == len(model.used) <= max_blocks
        for asked in prompts:
            known = [block in model.used for block in asked]
            assert index.count_known(asked) == sum(known), "a block is there, and one before it is not"


def test_blocks_that_were_never_computed_are_taken_back() -> None:
    index = PrefixIndex(10)
    index.add([b"a", b"b"])
    index.add([b"a", b"b", b"c", b"d"])
    index.forget([b"c", b"d"])
    assert index.count_known([b"a", b"b", b"c"]) == 2


def test_an_eviction_shrinks_the_index_from_its_oldest_end_and_spares_the_prompt_that_told_of_it() -> None:
    index = PrefixIndex(10)
    index.add([b"old", b"older"])
    index.add([b"young"])
    index.add([b"new", b"newer"])
    index.note_evicted(1, [b"new", b"newer"])
    assert index.count_known([b"old", b"older"]) == 1
    index.note_evicted(9, [b"new", b"newer"])
    assert (index.count_known([b"young"]), index.count_known([b"new", b"newer"])) == (0, 2)
