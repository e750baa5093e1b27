"""The sum that all ranks make of their parts: the same bits on each, whatever its place."""

from __future__ import annotations

import torch
from toka_engine.model.ranks import sum_in_order

BIG = 2.0**25  # 1 added to it is lost in float32


def test_parts_are_added_in_rank_order() -> None:
    parts = torch.tensor([[BIG, 1.0, BIG], [1.0, BIG, -BIG], [-BIG, -BIG, 1.0]])
    assert sum_in_order(parts).tolist() == [0.0, 0.0, 1.0]
    assert parts[0].tolist() == [BIG, 1.0, BIG], "a rank still needs its own part"


def test_a_sum_is_rounded_once() -> None:
    small = 2.0**-8  # half of what bfloat16 tells apart next to 1
    parts = torch.tensor([1.0, small, small], dtype=torch.bfloat16).view(3, 1)
    assert sum_in_order(parts).item() == 1.0 + 2 * small
    assert sum_in_order(parts).dtype is torch.bfloat16
