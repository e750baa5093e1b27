"""Qwen2 and Qwen2.5, dense: Llama with a bias on q, k and v."""

from __future__ import annotations

from toka_engine.model.architectures.llama import AttentionTraits, Llama
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Ops


class Qwen2(Llama):
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops) -> None:
        super().__init__(config, weights, ops, AttentionTraits(has_qkv_bias=True, has_out_bias=False))
