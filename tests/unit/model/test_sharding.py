"""Every head, column and token of a model is held by exactly the ranks that must hold it, whatever the sizes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from toka_engine.errors import ConfigError
from toka_engine.model.sharding import VOCABULARY_MULTIPLE, Shard, Sharding

SIZES = st.integers(1, 8)


def ranks_of(size: int) -> list[Sharding]:
    return [Sharding(rank, size) for rank in range(size)]


@given(size=SIZES, part=st.integers(1, 5000))
def test_equal_parts_cover_the_whole_in_rank_order(size: int, part: int) -> None:
    parts = [sharding.split("intermediate_size", size * part) for sharding in ranks_of(size)]
    assert [index for begin, end in parts for index in range(begin, end)] == list(range(size * part))
    assert {end - begin for begin, end in parts} == {part}


@given(size=SIZES, kv_heads=st.integers(1, 16), group=st.integers(1, 16))
@example(size=4, kv_heads=2, group=4)
@example(size=8, kv_heads=2, group=8)
def test_each_query_head_is_on_one_rank_together_with_its_kv_head(size: int, kv_heads: int, group: int) -> None:
    heads = kv_heads * group
    if heads % size or (kv_heads % size and size % kv_heads):
        with pytest.raises(ConfigError, match=rf"=({heads}|{kv_heads}) cannot be split over tp_size={size}"):
            Sharding(0, size).split_heads(heads, kv_heads)
        return
    ranges = [sharding.split_heads(heads, kv_heads) for sharding in ranks_of(size)]
    assert [head for each in ranges for head in range(each.begin, each.end)] == list(range(heads))
    assert {kv_head for each in ranges for kv_head in range(each.kv_begin, each.kv_end)} == set(range(kv_heads))
    for each in ranges:
        local_group = each.num_heads // each.num_kv_heads
        for head in range(each.begin, each.end):  # attention pairs them by their local numbers
            assert each.kv_begin + (head - each.begin) // local_group == head // group


@given(size=SIZES, vocab_size=st.integers(1, 300_000))
def test_each_token_is_on_one_rank_and_shards_begin_where_the_hash_does(size: int, vocab_size: int) -> None:
    part = -(-vocab_size // size)
    part += -part % VOCABULARY_MULTIPLE
    if size > 1 and part * (size - 1) >= vocab_size:  # nothing is left for the last one
        with pytest.raises(ConfigError, match=f"^vocab_size={vocab_size} cannot be split over tp_size={size}$"):
            Sharding(0, size).split_vocabulary(vocab_size)
        return
    parts = [sharding.split_vocabulary(vocab_size) for sharding in ranks_of(size)]
    assert parts[0][0] == 0
    assert parts[-1][1] == vocab_size
    assert all(parts[rank][1] == parts[rank + 1][0] for rank in range(size - 1))
    assert all(begin % VOCABULARY_MULTIPLE == 0 and begin < end for begin, end in parts)


def test_one_rank_holds_all() -> None:
    assert Sharding(0, 1).split("intermediate_size", 7) == (0, 7)
    assert Sharding(0, 1).split_vocabulary(7) == (0, 7)
    assert Sharding(0, 1).split_heads(9, 3).num_kv_heads == 3


def test_a_shard_knows_its_shape() -> None:
    assert Shard(1, 2, 5).cut((7, 8)) == (7, 3)
    assert Shard(0, 2, 5).cut((7,)) == (3,)
