"""The blocks of dense decoders: attention, the gated MLP, and the loop over a model's layers. Names no model.

A layer is written as papers write it: `x, residual = norm(x, residual)`, then a block of `x`. How adds and norms are
fused, how many rows there are and which of them are wanted is not a model's business (see `linear`, `residual`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from toka_engine.model.attention_backend import AttentionBackend
from toka_engine.model.builder import ModelBuilder
from toka_engine.model.linear import Activation, LmHead
from toka_engine.model.residual import Embedding, Norm, StreamEnd
from toka_engine.model.rope_tables import build_cos_sin


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Values that the blocks of one forward share."""

    attention: AttentionBackend
    cos_sin: torch.Tensor  # [max_positions, head_dim] float32
    wanted: torch.Tensor | None  # [n]: the rows that go on behind this layer's attention; None: all


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """The traits by which a family's attention differs from that of others."""

    has_qkv_bias: bool
    has_out_bias: bool
    has_head_norm: bool = False
    """RMSNorm of each head of q and k before RoPE."""


class Attention:
    """Rotary attention with grouped keys (Ainslie et al. 2023), over paged keys and values."""

    def __init__(self, build: ModelBuilder, index: int, traits: AttentionTraits) -> None:
        config, prefix = build.config, f"model.layers.{index}.self_attn"
        self._index, self._heads, self._head_dim = index - build.layers.start, build.heads, config.head_dim
        scales = build.kv_scales(prefix)
        of_keys = 1.0 if traits.has_head_norm else scales.keys  # a norm would take it away again
        self._qkv = build.qkv_linear(prefix, traits.has_qkv_bias, (of_keys, 1 / of_keys, 1 / scales.values))
        width = config.num_heads * config.head_dim
        self._out = build.residual_linear(f"{prefix}.o_proj", width, traits.has_out_bias, scales.values)
        self._rms_norm, self._eps = build.ops.rms_norm, config.rms_norm_eps
        self._head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if traits.has_head_norm:
            q_norm, k_norm = build.head_norm(f"{prefix}.q_norm"), build.head_norm(f"{prefix}.k_norm")
            self._head_norms = q_norm * scales.keys, k_norm / scales.keys

    def __call__(self, x: Activation, context: ForwardContext) -> Activation:
        """x [n, hidden_size], normed -> what the next norm adds to the residual stream."""
        num_heads, num_kv_heads = self._heads.num_heads, self._heads.num_kv_heads
        qkv = self._qkv(x)
        qkv = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, self._head_dim)
        q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if self._head_norms is not None:
            q, k = (self._norm_heads(each, weight) for each, weight in zip((q, k), self._head_norms, strict=True))
        mixed = context.attention.forward(self._index, q, k, v, context.cos_sin)
        return self._out(mixed.reshape(qkv.shape[0], num_heads * self._head_dim), context.wanted)

    def _norm_heads(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._rms_norm(x.reshape(-1, self._head_dim), weight, self._eps).view(x.shape)


class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, build: ModelBuilder, prefix: str) -> None:
        config = build.config
        config.fields.require("hidden_act", "silu")
        inner, has_bias = config.intermediate_size, config.has_mlp_bias
        self._gate_up = build.gated_linear(f"{prefix}.gate_proj", f"{prefix}.up_proj", inner, has_bias)
        self._down = build.residual_linear(f"{prefix}.down_proj", inner, has_bias)

    def __call__(self, x: Activation) -> Activation:
        """x [n, hidden_size], normed -> what the next norm adds to the residual stream."""
        return self._down(self._gate_up(x))


class DecoderLayer(Protocol):
    """One layer of a decoder."""

    def __call__(
        self,
        x: Activation,  # [n, hidden_size]: what the block before adds to the residual stream
        residual: torch.Tensor | None,  # [n, hidden_size]; None: `x` starts it
        context: ForwardContext,
    ) -> tuple[Activation, torch.Tensor]:
        """Return the same of this layer: what its last block adds, and the residual stream."""
        ...


class Decoder:
    """Runs a stack of decoder layers: a causal.CausalModel, which a model's file gives its parts, or a stage's."""

    def __init__(
        self,
        build: ModelBuilder,
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        norm: Norm | StreamEnd,
        head: LmHead | None,
    ) -> None:
        self.config = build.config
        self._is_first = build.stage.is_first
        self._embedding, self._layers, self._norm, self._head = embedding, layers, norm, head
        config = build.config
        self._cos_sin = build_cos_sin(config.rope, config.head_dim, config.max_positions).to(build.weights.device)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [n] int32 -> [n, hidden_size], new memory."""
        return self._embedding(ids)

    def forward(
        self, inputs: torch.Tensor, attention: AttentionBackend, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See causal.CausalModel. Behind its attention the last layer goes on with the wanted rows alone."""
        context = ForwardContext(attention, self._cos_sin, wanted=None)
        x: Activation = self.embed(inputs) if self._is_first else inputs
        residual: torch.Tensor | None = None
        *others, last = self._layers
        for layer in others:
            x, residual = layer(x, residual, context)
        x, residual = last(x, residual, ForwardContext(attention, self._cos_sin, wanted))
        return self._norm.finish(x, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""
        assert self._head is not None, "only the last stage makes logits"
        return self._head(hidden)
