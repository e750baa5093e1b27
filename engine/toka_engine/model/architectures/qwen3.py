"""Qwen3, dense: Llama with a norm on each head of q and k."""

from __future__ import annotations

from toka_engine.model.architectures.llama import Llama
from toka_engine.model.builder import ModelBuilder
from toka_engine.model.layers import AttentionTraits


class Qwen3(Llama):
    def __init__(self, build: ModelBuilder) -> None:
        has_bias = build.config.has_attention_bias
        super().__init__(build, AttentionTraits(has_bias, has_bias, has_head_norm=True))
