"""Qwen3, dense: Llama with a norm on each head of q and k."""

from __future__ import annotations

from toka_engine.model.architectures.llama import AttentionTraits, Llama
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Ops


class Qwen3(Llama):
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops) -> None:
        bias = config.has_attention_bias
        super().__init__(config, weights, ops, AttentionTraits(bias, bias, has_head_norm=True))
