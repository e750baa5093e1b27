"""Llama and its kin: RMSNorm, rotary attention with grouped keys, gated MLP. Variants change `AttentionTraits` only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from toka_engine.model.attention_backend import AttentionBackend
from toka_engine.model.layers import (
    GatedMlp,
    Head,
    NormedLinear,
    ResidualLinear,
    ResidualNorm,
    fuse,
)
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Ops
from toka_engine.model.rope_tables import build_cos_sin


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """How a family's attention differs."""

    has_qkv_bias: bool
    has_out_bias: bool
    has_head_norm: bool = False
    """RMSNorm of each head of q and k before RoPE."""


class Attention:
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        index: int,
        norm: torch.Tensor,
        traits: AttentionTraits,
    ) -> None:
        self._index, prefix = index, f"model.layers.{index}.self_attn"
        self._num_heads, self._num_kv_heads, self._head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        hidden, q_size, kv_size = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        names = [f"{prefix}.{name}_proj" for name in "qkv"]
        qkv = fuse(weights, names, [q_size, kv_size, kv_size], hidden, traits.has_qkv_bias)
        self._qkv = NormedLinear(ops, norm, config.rms_norm_eps, qkv)
        self._out = ResidualLinear(ops, fuse(weights, [f"{prefix}.o_proj"], [hidden], q_size, traits.has_out_bias))
        self._rms_norm, self._eps = ops.rms_norm, config.rms_norm_eps
        self._head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if traits.has_head_norm:
            shape = (config.head_dim,)
            self._head_norms = (
                weights.take(f"{prefix}.q_norm.weight", shape),
                weights.take(f"{prefix}.k_norm.weight", shape),
            )

    def __call__(
        self,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        attention: AttentionBackend,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Add `pending` to `residual` [T, hidden_size] in place, if there is any; returns what is pending then, and the
        residual: this one, or of the rows `wanted` alone.
        """
        heads, kv_heads, rows = self._num_heads, self._num_kv_heads, residual.shape[0]
        qkv = self._qkv(pending, residual).view(rows, heads + 2 * kv_heads, self._head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if self._head_norms is not None:
            q, k = (self._norm_heads(each, weight) for each, weight in zip((q, k), self._head_norms, strict=True))
        mixed = attention.forward(self._index, q, k, v, cos_sin).reshape(rows, heads * self._head_dim)
        if wanted is not None:
            mixed, residual = mixed.index_select(0, wanted), residual.index_select(0, wanted)
        return self._out(mixed, residual), residual

    def _norm_heads(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._rms_norm(x.reshape(-1, self._head_dim), weight, self._eps).view(x.shape)


class Layer:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, index: int, traits: AttentionTraits) -> None:
        prefix, shape = f"model.layers.{index}", (config.hidden_size,)
        input_norm = weights.take(f"{prefix}.input_layernorm.weight", shape)
        mlp_norm = weights.take(f"{prefix}.post_attention_layernorm.weight", shape)
        self.attention = Attention(config, weights, ops, index, input_norm, traits)
        self.mlp = GatedMlp(config, weights, ops, f"{prefix}.mlp", mlp_norm)


class Llama:
    """A causal.CausalModel."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, traits: AttentionTraits | None = None) -> None:
        bias = config.has_attention_bias
        traits = traits or AttentionTraits(has_qkv_bias=bias, has_out_bias=bias)
        self.config = config
        vocab_shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.take("model.embed_tokens.weight", vocab_shape)
        self._layers = [Layer(config, weights, ops, index, traits) for index in range(config.num_layers)]
        norm = weights.take("model.norm.weight", (config.hidden_size,))
        self._norm = ResidualNorm(ops, norm, config.rms_norm_eps)
        tied = config.has_tied_embeddings
        head = self._embedding if tied else weights.take("lm_head.weight", vocab_shape)
        self._head = Head(ops, head)
        self._cos_sin = build_cos_sin(config.rope, config.head_dim, config.max_positions).to(weights.device)

    def forward(
        self, ids: torch.Tensor, attention: AttentionBackend, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See causal.CausalModel. Beyond its attention the last layer goes on with the wanted rows alone."""
        residual = F.embedding(ids, self._embedding)
        pending: torch.Tensor | None = None
        *others, last = self._layers
        for layer in others:
            pending, residual = layer.attention(pending, residual, self._cos_sin, attention)
            pending = layer.mlp(pending, residual)
        pending, residual = last.attention(pending, residual, self._cos_sin, attention, wanted)
        return self._norm(last.mlp(pending, residual), residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""
        return self._head(hidden)
