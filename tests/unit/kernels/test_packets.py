"""Packets: the next kernel unpacks what the host wrote, and tokens come back at the ring index of their packet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toka_engine.model.in_flight import RING_SIZE
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.packets import Packets

SCRATCH, PAGE_SIZE, COLUMNS = 9, 4, 6
GROUP_WORDS = 300


def ints(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


NO_APPENDS = (ints(), ints(), ints())


@pytest.fixture
def parts(device: torch.device) -> tuple[Packets, DeviceSlots, torch.Tensor, torch.Tensor]:
    packets, state = Packets(5, GROUP_WORDS, SCRATCH, device), DeviceSlots(SCRATCH + 1, device)
    state.last_token.copy_(torch.arange(SCRATCH + 1) * 11)
    table = torch.zeros((SCRATCH + 1, COLUMNS), dtype=torch.int32, device=device)
    table[SCRATCH] = 19
    return packets, state, table, torch.full((20, PAGE_SIZE), -1, dtype=torch.int32, device=device)


def test_a_packet_sets_rows_ids_and_random_and_pads_with_the_padding_slot(parts) -> None:
    packets, state, table, page_tokens = parts
    packets.write(5, ints(3, 7), ints(5, 2), NO_APPENDS, ints(1, 2, 3, 4))
    packets.unpack(5, state, table, page_tokens)
    assert packets.slots.tolist() == [3, 7, SCRATCH, SCRATCH, SCRATCH]
    assert packets.positions.tolist() == [5, 2, 0, 0, 0]
    assert packets.ids.tolist() == [33, 77, 99, 99, 99]
    assert packets.random.tolist() == [1 | 2 << 32, 3 | 4 << 32]


def test_pages_are_appended_before_the_tokens_are_noted_in_them(parts) -> None:
    packets, state, table, page_tokens = parts
    table[7, 0] = 8
    packets.write(5, ints(3, 7), ints(5, 2), (ints(3, 4), ints(1, 5), ints(13, 14)), ints(0, 0, 0, 0))
    packets.unpack(5, state, table, page_tokens)
    assert (int(table[3, 1]), int(table[4, 5])) == (13, 14)
    noted = {(page, at): int(page_tokens[page, at]) for page, at in torch.nonzero(page_tokens >= 0).tolist()}
    assert noted == {(13, 1): 33, (8, 2): 77, (19, 0): 99}


def test_where_own_tokens_start_and_the_groups_come_with_a_packet_that_has_them(parts) -> None:
    packets, state, table, page_tokens = parts
    groups = np.arange(GROUP_WORDS, dtype=np.int32) + 1
    packets.write(4, ints(3, 7), ints(5, 2), NO_APPENDS, ints(1, 2, 3, 4), ints(16, 32), groups)
    packets.write(4, ints(3, 7), ints(6, 3), NO_APPENDS, ints(1, 2, 3, 4))
    packets.starts.fill_(-1)
    packets.unpack(4, state, table, page_tokens, has_groups=True)
    assert packets.starts.tolist() == [16, 32, 0, 0, -1]
    assert packets.groups.tolist() == groups.tolist()
    packets.unpack(4, state, table, page_tokens)
    assert packets.positions.tolist() == [6, 3, 0, 0, 0]


def test_a_shorter_packet_leaves_nothing_of_the_one_before_in_its_place(parts) -> None:
    packets, state, table, page_tokens = parts
    packets.write(5, ints(1, 2, 3), ints(9, 9, 9), (ints(1), ints(2), ints(5)), ints(0, 0, 0, 0))
    for _ in range(RING_SIZE - 1):
        packets.write(5, ints(4), ints(1), NO_APPENDS, ints(0, 0, 0, 0))
    packets.write(5, ints(6), ints(3), NO_APPENDS, ints(0, 0, 0, 0))  # in the first one's place
    packets.unpack(5, state, table, page_tokens)
    assert packets.slots.tolist() == [6, *4 * [SCRATCH]]
    assert packets.positions.tolist() == [3, 0, 0, 0, 0]
    assert int(table[1, 2]) == 0


def test_tokens_are_written_at_the_ring_index_of_the_packet_that_was_unpacked(parts, device: torch.device) -> None:
    packets, state, table, page_tokens = parts
    ring_indices = []
    for turn in range(2 * RING_SIZE + 1):
        ring_indices.append(packets.write(5, ints(turn % 8), ints(turn), NO_APPENDS, ints(0, 0, 0, 0)))
        packets.unpack(5, state, table, page_tokens)
        packets.sampled_ids.copy_(torch.arange(5) + 100 * turn)
        packets.write_results(5)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert (int(packets.slots[0]), int(packets.positions[0])) == (turn % 8, turn)
        assert packets.tokens(ring_indices[-1], 3).tolist() == [100 * turn, 100 * turn + 1, 100 * turn + 2]
    assert ring_indices == [turn % RING_SIZE for turn in range(2 * RING_SIZE + 1)]
    assert packets.tokens(ring_indices[-2], 2).tolist() == [100 * (2 * RING_SIZE - 1), 100 * (2 * RING_SIZE - 1) + 1]


def test_the_count_of_packets_may_begin_anew(parts, device: torch.device) -> None:
    packets, state, table, page_tokens = parts
    packets._num_unpacked.fill_((1 << 30) - 2)
    packets._num_written = (1 << 30) - 2
    for turn in range(5):
        place = packets.write(5, ints(turn), ints(turn), NO_APPENDS, ints(0, 0, 0, 0))
        packets.unpack(5, state, table, page_tokens)
        packets.sampled_ids.fill_(turn)
        packets.write_results(5)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert int(packets.slots[0]) == turn
        assert packets.tokens(place, 1).tolist() == [turn]
    assert int(packets._num_unpacked) == 3


def test_steps_of_other_sizes_share_the_rings_and_fill_no_more_than_their_size(parts) -> None:
    packets, state, table, page_tokens = parts
    packets.write(5, ints(1, 2, 3, 4, 5), ints(1, 2, 3, 0, 1), NO_APPENDS, ints(0, 0, 0, 0))
    packets.unpack(5, state, table, page_tokens)
    packets.write(2, ints(6), ints(3), NO_APPENDS, ints(0, 0, 0, 0))
    packets.unpack(2, state, table, page_tokens)
    assert packets.slots.tolist() == [6, SCRATCH, 3, 4, 5]
    assert packets.positions.tolist() == [3, 0, 3, 0, 1]


def test_more_rows_than_a_block_are_all_there(device: torch.device) -> None:
    count = 300
    packets, state = Packets(count + 7, GROUP_WORDS, 400, device), DeviceSlots(401, device)
    state.last_token.copy_(torch.arange(401) + 1000)
    table = torch.zeros((401, 2), dtype=torch.int32, device=device)
    page_tokens = torch.zeros((900, PAGE_SIZE), dtype=torch.int32, device=device)
    slots = np.random.default_rng(1).permutation(400)[:count].astype(np.int32)
    positions = np.arange(count, dtype=np.int32) % (2 * PAGE_SIZE)
    columns = positions // PAGE_SIZE
    pages = np.arange(count, dtype=np.int32) + 500
    packets.write(count, slots, positions, (slots, columns, pages), ints(0, 0, 0, 0))
    packets.unpack(count, state, table, page_tokens)
    assert packets.ids[:count].tolist() == (slots + 1000).tolist()
    assert table[slots, columns].tolist() == pages.tolist()
    assert page_tokens[pages, positions % PAGE_SIZE].tolist() == (slots + 1000).tolist()
    packets.sampled_ids.copy_(torch.arange(count + 7))
    packets.write_results(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert packets.tokens(0, count).tolist() == list(range(count))
