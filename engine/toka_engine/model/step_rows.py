"""Which rows a step's forward has, and which of them are sampled. numpy only; the same for all devices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toka_engine.messages import Int32s, Step
from toka_engine.model.attention_backend import StepLayout
from toka_engine.model.slot_state import HostSlots


def make_layout(step: Step, slots: HostSlots, keep_seeded_out: bool) -> StepLayout:
    """Lay out the rows of `step`; `slots` as before its forward.

    `keep_seeded_out` keeps seeded rows out of Hydragen groups, whose merge rounds differently: where a row's result
    does not depend on the rows beside it, the same request then gives the same text whatever else runs.
    """
    groups = (
        step.group_first_rows,
        step.group_num_rows,
        step.group_first_columns,
        step.group_num_columns,
    )
    if keep_seeded_out and step.group_first_rows.size:
        is_seeded = slots["seed"][step.decode_slots] >= 0
        if is_seeded.any():
            groups = leave_out_rows(is_seeded, *groups)
    return StepLayout(
        step.decode_slots,
        slots["length"][step.decode_slots],
        step.prefill_slots,
        step.prefill_starts,
        step.prefill_lengths,
        *groups,
    )


def find_rows(layout: StepLayout) -> tuple[Int32s, Int32s]:
    """Find slot and position of each of the step's rows, [T] each."""
    lengths = layout.prefill_lengths
    if not lengths.size:
        return layout.decode_slots, layout.decode_positions
    within = np.arange(int(lengths.sum()), dtype=np.int32) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    positions = np.concatenate((layout.decode_positions, np.repeat(layout.prefill_starts, lengths) + within))
    slots = np.concatenate((layout.decode_slots, np.repeat(layout.prefill_slots, lengths)))
    return slots.astype(np.int32), positions.astype(np.int32)


def leave_out_rows(
    is_left_out: NDArray[np.bool_],  # [d]
    first_rows: Int32s,
    num_rows: Int32s,
    first_columns: Int32s,
    num_columns: Int32s,
) -> tuple[Int32s, Int32s, Int32s, Int32s]:
    """Cut Hydragen groups [g] into the runs of their rows that stay. A row leaves all its groups or none."""
    parts: list[tuple[int, int, int, int]] = []
    for first, count, column, columns in zip(
        first_rows.tolist(), num_rows.tolist(), first_columns.tolist(), num_columns.tolist(), strict=True
    ):
        stays = np.concatenate(([False], ~is_left_out[first : first + count], [False]))
        edges = np.flatnonzero(stays[1:] != stays[:-1])
        parts.extend((first + begin, end - begin, column, columns) for begin, end in edges.reshape(-1, 2).tolist())
    table = np.array(parts, np.int32).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def find_sampled_rows(step: Step) -> tuple[Int32s, Int32s | None]:
    """Find the rows whose logits are needed [n], and each sample's index into those logits [R] (None: in order)."""
    num_decode = step.decode_slots.size
    chunks, chunk_of_entry = np.unique(step.fanout_chunks, return_inverse=True)
    last_rows = num_decode + np.cumsum(step.prefill_lengths, dtype=np.int32) - 1
    decode_rows = np.arange(num_decode, dtype=np.int32)
    rows = np.concatenate((decode_rows, last_rows[chunks])).astype(np.int32)
    if chunks.size == step.fanout_chunks.size and (chunks == step.fanout_chunks).all():
        return rows, None
    entries = num_decode + chunk_of_entry.reshape(-1).astype(np.int32)
    return rows, np.concatenate((decode_rows, entries)).astype(np.int32)
