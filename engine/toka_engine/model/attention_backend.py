"""The interface of attention. A model calls `forward` once per layer; the runner calls the rest between steps.

An implementation owns the KV cache, with the id of each token stored with its keys and values, and the block table, all
on its device. RoPE and the write of K and V into the pages belong to `forward`, because on a GPU they are one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.model_config import ModelConfig
from toka_engine.model.sharding import Sharding


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """A model's attention sizes. Head counts are this rank's."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor of q.k; usually head_dim ** -0.5."""
    dtype: torch.dtype
    device: torch.device
    cache_dtype: torch.dtype | None = None
    """The KV cache's; None: `dtype`."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        sharding: Sharding | None = None,
        num_layers: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> AttentionShape:
        """The shape of `model`, or of a rank's heads and a stage's `num_layers`.

        Raises ConfigError if the heads cannot be split over the ranks.
        """
        heads = (sharding or Sharding(0, 1)).split_heads(model.num_heads, model.num_kv_heads)
        return cls(
            num_layers=num_layers or model.num_layers,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=model.head_dim,
            scale=model.head_dim**-0.5,
            dtype=dtype,
            device=device,
            cache_dtype=cache_dtype,
        )

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the KV cache."""
        return self.cache_dtype or self.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.stored_dtype.itemsize


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The rows of one forward, on the host. T = num_decode + sum(prefill_lengths) rows.

    Row i < num_decode is one token of decode_slots[i] at position decode_positions[i]; then come the chunks.
    """

    decode_slots: NDArray[np.int32]  # [d]
    decode_positions: NDArray[np.int32]  # [d]
    prefill_slots: NDArray[np.int32]  # [p]
    prefill_starts: NDArray[np.int32]  # [p]
    prefill_lengths: NDArray[np.int32]  # [p]
    # Hydragen groups over decode rows: see messages.Step
    group_first_rows: NDArray[np.int32]  # [g]
    group_num_rows: NDArray[np.int32]  # [g]
    group_first_columns: NDArray[np.int32]  # [g]
    group_num_columns: NDArray[np.int32]  # [g]


class AttentionBackend(Protocol):
    """Paged attention over slots. One instance per worker."""

    def allocate(self, num_pages: int, page_size: int, max_seqs: int, max_pages_per_seq: int) -> None:
        """Allocate the KV cache [layers, 2, pages, ...], the pages' token ids and the block table
        [max_seqs, max_pages_per_seq]."""
        ...

    def append_pages(self, slots: NDArray[np.int32], columns: NDArray[np.int32], pages: NDArray[np.int32]) -> None:
        """Set table[slots[i], columns[i]] = pages[i]."""
        ...

    def copy_pages(self, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        """Copy whole pages in every layer, and their token ids."""
        ...

    def plan(self, layout: StepLayout) -> None:
        """Prepare the forward of this step."""
        ...

    def write_tokens(self, ids: torch.Tensor) -> None:
        """Store ids [T] int32 of the planned step's rows with their keys and values.

        So shared, copied and cached pages bring their tokens along, and penalties can read them.
        """
        ...

    def forward(
        self,
        layer: int,
        q: torch.Tensor,  # [T, num_heads, head_dim], before RoPE; may be a strided view of a packed qkv
        k: torch.Tensor,  # [T, num_kv_heads, head_dim], before RoPE
        v: torch.Tensor,  # [T, num_kv_heads, head_dim]
        cos_sin: torch.Tensor,  # [max_positions, head_dim] fp32: cos in the first half, sin in the second
    ) -> torch.Tensor:
        """Rotate q and k (halves, as Llama does), write k and v to the pages, attend.

        Returns [T, num_heads, head_dim].
        """
        ...
