"""Qwen2 and Qwen2.5, dense: Llama with a bias on q, k and v."""

from __future__ import annotations

from toka_engine.model.architectures.llama import Llama
from toka_engine.model.builder import ModelBuilder
from toka_engine.model.layers import AttentionTraits


class Qwen2(Llama):
    def __init__(self, build: ModelBuilder) -> None:
        super().__init__(build, AttentionTraits(has_qkv_bias=True, has_out_bias=False))
