"""The interface of a causal language model, as runners use it."""

from __future__ import annotations

from typing import Protocol

import torch

from toka_engine.model.attention_backend import AttentionBackend
from toka_engine.model.model_config import ModelConfig


class CausalModel(Protocol):
    """A decoder over T rows of tokens; where they belong is the attention backend's plan."""

    config: ModelConfig

    def forward(
        self, ids: torch.Tensor, attention: AttentionBackend, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids [T] int32 -> normed hidden states [T, hidden_size], or those of the rows `wanted` [n], in their order.

        What no later layer reads need not be computed for the others: keys and values are written for all rows.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""
        ...
