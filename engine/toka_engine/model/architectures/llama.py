"""Llama: RMSNorm, rotary attention with grouped keys, gated MLP. Models that differ in attention give other traits."""

from __future__ import annotations

import torch

from toka_engine.model.builder import ModelBuilder
from toka_engine.model.layers import Attention, AttentionTraits, Decoder, ForwardContext, GatedMlp
from toka_engine.model.linear import Activation


class Layer:
    """A layers.DecoderLayer."""

    def __init__(self, build: ModelBuilder, index: int, traits: AttentionTraits) -> None:
        prefix = f"model.layers.{index}"
        self.input_norm = build.norm(f"{prefix}.input_layernorm")
        self.attention = Attention(build, index, traits)
        self.mlp_norm = build.norm(f"{prefix}.post_attention_layernorm")
        self.mlp = GatedMlp(build, f"{prefix}.mlp")

    def __call__(
        self, x: Activation, residual: torch.Tensor | None, context: ForwardContext
    ) -> tuple[Activation, torch.Tensor]:
        """x, residual [n, hidden_size] -> the same behind this layer."""
        x, residual = self.input_norm(x, residual)
        x = self.attention(x, context)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


class Llama(Decoder):
    def __init__(self, build: ModelBuilder, traits: AttentionTraits | None = None) -> None:
        config, has_bias = build.config, build.config.has_attention_bias
        traits = traits or AttentionTraits(has_qkv_bias=has_bias, has_out_bias=has_bias)
        embedding = build.embedding()
        layers = [Layer(build, index, traits) for index in build.layers]
        head = build.lm_head(tied_to=embedding if config.has_tied_embeddings else None)
        super().__init__(build, embedding, layers, build.final_norm("model.norm"), head)
