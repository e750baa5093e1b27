"""What every model offers to the runner, and what the registry needs to build one."""

from __future__ import annotations

from typing import Protocol

import torch

from toka_engine.model.attention.base import AttentionBackend
from toka_engine.model.model_config import ModelConfig


class CausalModel(Protocol):
    """A decoder over T rows of tokens; where they belong is the attention backend's plan."""

    config: ModelConfig

    def forward(self, ids: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """ids [T] int32 -> normed hidden states [T, hidden_size]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""
        ...
