"""The interface of a causal language model, as runners use it."""

from __future__ import annotations

from typing import Protocol

import torch

from toka_engine.model.attention_backend import AttentionBackend
from toka_engine.model.model_config import ModelConfig


class CausalModel(Protocol):
    """A decoder over T rows of tokens, or a pipeline stage of it; where rows belong is the attention backend's plan."""

    config: ModelConfig

    def forward(
        self, inputs: torch.Tensor, attention: AttentionBackend, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids [T] int32 -> normed hidden states [T, hidden_size], or those of the rows `wanted` [n], in their order.

        What no later layer reads need not be computed for the others: keys and values are written for all rows.
        A stage that is not the first has the residual stream [T, hidden_size] of the one before it as `inputs` (on
        tensor parallel ranks: a part of it, and their sum is the stream), and may change it; one that is not the last
        returns the stream, for all rows.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""
        ...
