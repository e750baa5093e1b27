"""Makes a model's layers: their weights by name, this rank's part of them, as the device implements them.

A model's file says which layers it has; nothing in it knows ranks, stages or devices. Weights that are missing or
misshapen are refused by name (see `loader`), sizes that cannot be split over the ranks with both numbers (see
`sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toka_engine.model.kv_scales import KvScales
from toka_engine.model.linear import GatedLinear, Linear, LinearParameters, LmHead, ResidualLinear
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ops import Ops
from toka_engine.model.quantization import QuantisedWeight
from toka_engine.model.ranks import Ranks
from toka_engine.model.residual import Embedding, Norm, StreamEnd
from toka_engine.model.sharding import HeadRange, Shard, Sharding
from toka_engine.model.stages import Stage

FP8_MULTIPLE = 16
"""Inputs and outputs of a GEMM in fp8 are multiples of it: operands of tensor cores are read by 16 bytes."""


@dataclass(frozen=True, slots=True)
class ModelBuilder:
    """Takes weights and makes layers of them. A name here is a tensor's without its `.weight` or `.bias`."""

    config: ModelConfig
    weights: Weights
    ops: Ops
    ranks: Ranks
    stage: Stage

    @property
    def layers(self) -> range:
        """The numbers of the layers to build: all, or those of this rank's pipeline stage."""
        return self.stage.layers

    @property
    def sharding(self) -> Sharding:
        """The part that this rank holds."""
        return Sharding(self.ranks.rank, self.ranks.size)

    @property
    def heads(self) -> HeadRange:
        """This rank's attention heads."""
        return self.sharding.split_heads(self.config.num_heads, self.config.num_kv_heads)

    def linear(self, names: Sequence[str], out_size: int, has_bias: bool = False) -> Linear:
        """Linear layers of the residual stream, with `out_size` outputs each, as one GEMM. Split by outputs."""
        return Linear(self.ops, self._take_outputs(self._split_outputs(names, out_size), has_bias))

    def gated_linear(self, gate: str, up: str, out_size: int, has_bias: bool = False) -> GatedLinear:
        """silu(gate) * up of the residual stream. Split by outputs."""
        return GatedLinear(self.ops, self._take_outputs(self._split_outputs((gate, up), out_size), has_bias))

    def kv_scales(self, prefix: str) -> KvScales:
        """The factors by which what the KV cache of attention `prefix` holds is smaller than its keys and values."""
        return self.weights.take_kv_scales(prefix)

    def qkv_linear(
        self, prefix: str, has_bias: bool = False, factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ) -> Linear:
        """The projections to this rank's queries, keys and values, in this order, as one GEMM. Split by heads.

        Each is multiplied by its one of the `factors`.
        """
        config, heads, width = self.config, self.heads, self.config.head_dim
        q_shard = Shard(0, heads.begin * width, heads.end * width)
        kv_shard = Shard(0, heads.kv_begin * width, heads.kv_end * width)
        outputs = [
            (f"{prefix}.q_proj", config.num_heads * width, q_shard),
            (f"{prefix}.k_proj", config.num_kv_heads * width, kv_shard),
            (f"{prefix}.v_proj", config.num_kv_heads * width, kv_shard),
        ]
        sizes = [shard.end - shard.begin for _, _, shard in outputs]
        return Linear(self.ops, self._take_outputs(outputs, has_bias).scale_outputs(sizes, factors))

    def residual_linear(self, name: str, in_size: int, has_bias: bool = False, factor: float = 1.0) -> ResidualLinear:
        """A linear layer whose output is added to the residual stream. Split by inputs, so the bias is one rank's.

        Its weight is multiplied by `factor`.
        """
        width = self.config.hidden_size
        shard = Shard(1, *self.sharding.split(name, in_size))
        bias = self.weights.take(f"{name}.bias", (width,)) if has_bias else None
        parameters = self._take_linear([(name, (width, in_size), shard)], bias if self.sharding.rank == 0 else None)
        if factor != 1.0:
            parameters = parameters.scale_weight(torch.tensor(factor))
        return ResidualLinear(self.ops, parameters, is_partial=self.ranks.size > 1)

    def norm(self, name: str, offset: float = 0.0) -> Norm:
        """The RMSNorm of the residual stream whose weight is the stored one plus `offset`."""
        weight = self.weights.take(f"{name}.weight", (self.config.hidden_size,))
        return Norm(self.ops, weight + offset if offset else weight, self.config.rms_norm_eps, self.ranks)

    def final_norm(self, name: str, offset: float = 0.0) -> Norm | StreamEnd:
        """The norm behind the last layer; where other stages follow, what hands the residual stream over to them."""
        if self.stage.is_last:
            return self.norm(name, offset)
        weights = self.weights
        return StreamEnd(
            self.ops, torch.ones(self.config.hidden_size, dtype=weights.dtype, device=weights.device), self.ranks
        )

    def head_norm(self, name: str) -> torch.Tensor:
        """The weight [head_dim] of an RMSNorm that all heads of the queries, or of the keys, share."""
        return self.weights.take(f"{name}.weight", (self.config.head_dim,))

    def embedding(self, name: str = "model.embed_tokens") -> Embedding:
        """The token embedding. Split by vocabulary."""
        first, _ = self.sharding.split_vocabulary(self.config.vocab_size)
        weight = self._take_vocabulary(name) if self.stage.is_first else None
        return Embedding(name, weight, first if self.ranks.size > 1 else None)

    def lm_head(self, tied_to: Embedding | None, name: str = "lm_head") -> LmHead | None:
        """The layer that makes logits, with the embedding's weight if it is tied to one. Split by vocabulary.

        The last stage alone has it. It reads the weight of an embedding that the first stage holds once more.
        """
        if not self.stage.is_last:
            return None
        if tied_to is None:
            return LmHead(self.ops, self._take_vocabulary(name))
        return LmHead(self.ops, self._take_vocabulary(tied_to.name) if tied_to.weight is None else tied_to.weight)

    def _take_vocabulary(self, name: str) -> torch.Tensor:
        vocab_size = self.config.vocab_size
        shard = Shard(0, *self.sharding.split_vocabulary(vocab_size))
        return self.weights.take(f"{name}.weight", (vocab_size, self.config.hidden_size), shard)

    def _split_outputs(self, names: Sequence[str], out_size: int) -> list[tuple[str, int, Shard]]:
        return [(name, out_size, Shard(0, *self.sharding.split(name, out_size))) for name in names]

    def _take_outputs(self, outputs: Sequence[tuple[str, int, Shard]], has_bias: bool) -> LinearParameters:
        """Name, number of outputs and this rank's of them -> the weights [outputs of all names, hidden_size]."""
        width, take = self.config.hidden_size, self.weights.take
        biases = [take(f"{name}.bias", (size,), shard) for name, size, shard in outputs] if has_bias else None
        weights = [(name, (size, width), shard) for name, size, shard in outputs]
        return self._take_linear(weights, None if biases is None else torch.cat(biases))

    def _take_linear(
        self, parts: Sequence[tuple[str, tuple[int, int], Shard]], bias: torch.Tensor | None
    ) -> LinearParameters:
        """Name, whole shape and this rank's part of weights that are one GEMM -> its parameters.

        It computes with 8-bit floats where all its weights are some, and have sizes that tensor cores multiply so.
        """
        named = [(f"{name}.weight", shape, shard) for name, shape, shard in parts]
        outs, ins = zip(*(shard.cut(shape) for _, shape, shard in named), strict=True)
        has_sizes = sum(outs) % FP8_MULTIPLE == 0 and ins[0] % FP8_MULTIPLE == 0
        if has_sizes and all(self.weights.is_quantised(name) for name, _, _ in named):
            weight = QuantisedWeight.concatenate([self.weights.take_quantised(*each) for each in named])
            return LinearParameters(weight.values, bias, weight.scale)
        weights = [self.weights.take(*each) for each in named]
        return LinearParameters(torch.cat(weights) if len(weights) > 1 else weights[0], bias)
