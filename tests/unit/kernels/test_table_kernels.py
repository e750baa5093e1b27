"""The kernels over the block table, the pages and the slots move exactly what they are told to."""

from __future__ import annotations

import numpy as np
import torch
from toka_engine.slot_parameters import SLOT_COLUMNS, SlotBatch


def int32(device: torch.device, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_set_table_sets_the_named_entries_only(device) -> None:
    from toka_engine.model.kernels.pages import set_table

    table = torch.zeros(5, 9, dtype=torch.int32, device=device)
    set_table(table, int32(device, 4, 0, 4, 8, 0, 2, 11, 12, 13))
    expected = torch.zeros_like(table)
    expected[4, 8], expected[0, 0], expected[4, 2] = 11, 12, 13
    assert torch.equal(table, expected)


def test_flatten_table_lays_page_lists_side_by_side(device) -> None:
    from toka_engine.model.kernels.pages import flatten_table

    table = torch.arange(4 * 300, dtype=torch.int32, device=device).view(4, 300)
    counts, slots, first = [2, 0, 290, 1], [3, 1, 0, 3], [0, 0, 10, 7]
    indptr = int32(device, 0, *np.cumsum(counts).tolist())
    out = torch.full((sum(counts) + 3,), -1, dtype=torch.int32, device=device)
    flatten_table(table, int32(device, *slots), int32(device, *first), indptr, out)
    expected = torch.cat([table[s, f : f + n] for s, f, n in zip(slots, first, counts, strict=True)])
    assert torch.equal(out[: sum(counts)], expected)
    assert out[sum(counts) :].tolist() == [-1, -1, -1]


def test_copy_pages_copies_every_plane_of_the_named_pages(device, generator) -> None:
    from toka_engine.model.kernels.pages import copy_pages

    cache = torch.randn(6, 7, 1500, generator=generator, device=device)
    expected = cache.clone()
    expected[:, [5, 0]] = cache[:, [2, 3]]
    copy_pages(cache, int32(device, 2, 3), int32(device, 5, 0))
    assert torch.equal(cache, expected)


def test_new_slots_get_the_columns_of_the_device_and_others_keep_theirs(device) -> None:
    from toka_engine.model.kernels.device_slots import DeviceSlots, pack_new_slots, set_slots

    slots = DeviceSlots(6, device)
    on_device = [column for column in SLOT_COLUMNS if column.on_device]
    expected = {column.name: np.full(6, column.default, column.dtype) for column in on_device}
    random = np.random.default_rng(0)
    for named in ([5, 1], [4], [0, 5, 2]):
        new = {column.name: random.integers(-(2**62), 2**62, len(named)).astype(column.dtype) for column in on_device}
        batch = SlotBatch.of(named, num_logprobs=3, **new)
        set_slots(slots, torch.from_numpy(pack_new_slots(batch)).to(device))
        for name, values in new.items():
            expected[name][named] = values
    set_slots(slots, torch.from_numpy(pack_new_slots(SlotBatch.of([3]))).to(device))  # defaults: not sent, but set
    set_slots(slots, torch.from_numpy(pack_new_slots(SlotBatch())).to(device))
    for name, values in expected.items():
        np.testing.assert_array_equal(slots[name].cpu().numpy(), values)


def test_defaults_replace_what_a_slots_last_owner_had(device) -> None:
    from toka_engine.model.kernels.device_slots import DeviceSlots, pack_new_slots, set_slots

    slots = DeviceSlots(3, device)
    for batch in (SlotBatch.of([1], seed=7, top_k=40, temperature=0.5), SlotBatch.of([1], top_k=2)):
        set_slots(slots, torch.from_numpy(pack_new_slots(batch)).to(device))
    assert [slots[name][1].item() for name in ("seed", "top_k", "temperature")] == [-1, 2, 1.0]


def test_gather_ids_takes_last_tokens_then_prefill_tokens(device) -> None:
    from toka_engine.model.kernels.device_slots import DeviceSlots, gather_ids

    state = DeviceSlots(4, device)
    state.last_token.copy_(int32(device, 10, 11, 12, 13))
    out = int32(device, -1, -1, -1, -1, -1)
    gather_ids(state, int32(device, 3, 1, 0, 0, 0), int32(device, 7, 8, 9), 2, out)
    assert out.tolist() == [13, 11, 7, 8, 9]


def test_write_tokens_notes_each_rows_token_at_its_place_in_the_pages(device) -> None:
    from toka_engine.model.kernels.pages import write_tokens

    table = int32(device, 5, 2, 0, 1).view(2, 2)
    page_tokens = torch.full((6, 3), -1, dtype=torch.int32, device=device)
    write_tokens(
        int32(device, 70, 71, 72, 73), int32(device, 0, 1, 1, 0), int32(device, 1, 5, 0, 3), table, page_tokens
    )
    expected = torch.full_like(page_tokens, -1)
    expected[5, 1], expected[1, 2], expected[0, 0], expected[2, 0] = 70, 71, 72, 73
    assert torch.equal(page_tokens, expected)
