"""Quantised checkpoints: the schemes of config.json that are understood, and the values that stored weights stand for.

A weight of 8-bit floats (e4m3, Micikevicius et al. 2022) stands for its values times a scale: one of the whole tensor,
one of each output channel, or one of each block of outputs and inputs. Layers that a checkpoint leaves as they were
are known by the dtype of their tensors, so lists of layers in config.json are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toka_engine.errors import ModelInvalidError
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.sharding import Shard

SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""Endings that make the name of a weight's scale of the weight's own. Both are factors, whatever the first one says."""
E4M3 = torch.float8_e4m3fn
_PIECE_VALUES = 1 << 22
"""Values that are computed in fp32 at a time."""
_LEAST = 1e-30
"""Rows of smaller values become zeros: the reciprocal of a scale must be finite."""
_SUPPORTED = "8-bit floats of fp8, compressed-tensors, fbgemm_fp8 and modelopt are"


@dataclass(frozen=True, slots=True)
class Quantization:
    """The part of a checkpoint's scheme that the shapes of its scales do not tell."""

    block: tuple[int, int] | None
    """Outputs and inputs that share a scale; None where no weight has such blocks."""


def read_quantization(fields: ConfigFields) -> Quantization | None:
    """Check `quantization_config`; None without one. Raises ModelInvalidError where it is not about 8-bit floats."""
    if fields.fields.get("quantization_config") is None:
        return None
    scheme = fields.child("quantization_config")
    match method := scheme.fields.get("quant_method"):
        case "fp8":
            _require_e4m3(scheme)
            return Quantization(_read_block(scheme, "weight_block_size"))
        case "fbgemm_fp8":
            return Quantization(None)
        case "modelopt":
            scheme.require("quant_algo", "FP8")
            return Quantization(None)
        case "compressed-tensors":
            return _read_groups(scheme)
        case _:
            raise scheme.error(f"quant_method={method!r:.80} is not supported ({_SUPPORTED})")


def _require_e4m3(scheme: ConfigFields) -> None:
    fmt = scheme.fields.get("fmt")
    if fmt not in (None, "e4m3", "float8_e4m3fn"):
        raise scheme.error(f"fmt={fmt!r:.80} is not supported (e4m3 is)")


def _read_block(scheme: ConfigFields, name: str) -> tuple[int, int] | None:
    value = scheme.fields.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size >= 1 for size in value):
        raise scheme.error(f"{name} must be two positive integers, not {value!r:.80}")
    return value[0], value[1]


def _read_groups(scheme: ConfigFields) -> Quantization:
    sparsity = scheme.fields.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise scheme.error("sparsity_config is not supported (dense weights are)")
    groups = scheme.child("config_groups")
    blocks = {_read_group(groups.child(name).child("weights")) for name in groups.fields} - {None}
    if not groups.fields or len(blocks) > 1:
        raise scheme.error("config_groups must hold groups of layers, with blocks of one size")
    return Quantization(blocks.pop() if blocks else None)


def _read_group(weights: ConfigFields) -> tuple[int, int] | None:
    if weights.fields.get("type") != "float" or weights.fields.get("num_bits") != 8:
        found = f"{weights.fields.get('num_bits')!r:.20} bits of type {weights.fields.get('type')!r:.20}"
        raise weights.error(f"weights of {found} are not supported ({_SUPPORTED})")
    weights.require("symmetric", True)
    strategy = weights.fields.get("strategy")
    if strategy not in ("tensor", "channel", "block"):
        raise weights.error(f"strategy={strategy!r:.80} is not supported (tensor, channel and block are)")
    if strategy != "block":
        return None
    if (block := _read_block(weights, "block_structure")) is None:
        raise weights.error("block_structure must be two positive integers: the strategy is block")
    return block


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight of 8-bit floats, as linear layers compute with it."""

    values: torch.Tensor  # [out, in] float8_e4m3fn
    scale: torch.Tensor  # [out] float32

    @classmethod
    def concatenate(cls, parts: Sequence[QuantisedWeight]) -> QuantisedWeight:
        """Return the outputs of all `parts`, in their order."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.scale for part in parts]))


def quantise_weight(weight: torch.Tensor) -> QuantisedWeight:
    """weight [out, in] -> 8-bit floats, with scales by which the largest value of each row becomes e4m3's largest."""
    num_rows = max(1, _PIECE_VALUES // max(1, weight.shape[1]))
    pieces = zip(range(0, weight.shape[0], num_rows), weight.split(num_rows), strict=True)
    return quantise_pieces(weight.shape, weight.device, ((begin, piece.float()) for begin, piece in pieces))


def quantise_pieces(
    shape: torch.Size, device: torch.device, pieces: Iterable[tuple[int, torch.Tensor]]
) -> QuantisedWeight:
    """Quantise a weight [out, in] that comes as some rows of fp32 at a time, each with the first row's number."""
    values = torch.empty(shape, dtype=E4M3, device=device)
    scale = torch.empty(shape[0], dtype=torch.float32, device=device)
    for begin, piece in pieces:
        rows = slice(begin, begin + piece.shape[0])
        scale[rows] = piece.abs().amax(1).clamp_(min=_LEAST) / torch.finfo(E4M3).max
        values[rows] = (piece / scale[rows, None]).to(E4M3)
    return QuantisedWeight(values, scale)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of 8-bit floats [out, in] as the file has it, and its scale."""

    scale_name: str
    shape: tuple[int, int]
    scale: torch.Tensor
    block: tuple[int, int] | None

    def check(self, folder: Path) -> None:
        """Raise ModelInvalidError where the scale has a shape that no scheme gives it, or values that no scale has."""
        found = f"{folder}: tensor {self.scale_name}"
        if tuple(self.scale.shape) not in set(self._list_shapes()):
            shapes = " or ".join(str(list(shape)) for shape in self._list_shapes())
            raise ModelInvalidError(
                f"{found} has shape {list(self.scale.shape)}; for a weight of {list(self.shape)} it must be {shapes}"
            )
        values = self.scale.float()
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ModelInvalidError(f"{found} has values that are not positive and finite")

    def dequantise(self, part: torch.Tensor, shard: Shard | None, dtype: torch.dtype) -> torch.Tensor:
        """The `shard` of the weight [rows, columns], as 8-bit floats, -> the values that it stands for."""
        values = torch.empty(part.shape, dtype=dtype, device=part.device)
        for begin, piece in self._list_pieces(part, shard):
            values[begin : begin + piece.shape[0]] = piece
        return values

    def keep(self, part: torch.Tensor, shard: Shard | None) -> QuantisedWeight:
        """The `shard` of the weight, as 8-bit floats, -> 8-bit floats with a scale for each row.

        They are the stored ones where rows have a scale; those of blocks are rounded once more.
        """
        scale = self.scale.to(part.device, torch.float32)
        if self.has_blocks:
            return quantise_pieces(part.shape, part.device, self._list_pieces(part, shard))
        if scale.numel() == 1:
            return QuantisedWeight(part, scale.reshape(1).repeat(part.shape[0]))
        scale = scale.reshape(-1)
        return QuantisedWeight(part, scale[shard.begin : shard.end] if shard is not None and shard.dim == 0 else scale)

    @property
    def has_blocks(self) -> bool:
        """Whether blocks of the weight have a scale each."""
        if self.scale.numel() == 1:
            return False
        return self.block is not None and tuple(self.scale.shape) == _count_blocks(self.shape, self.block)

    def _list_pieces(self, part: torch.Tensor, shard: Shard | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row and the values, in fp32, of some rows of the `shard` at a time.

        Products and scales of the whole weight in fp32 would take several times the memory of the values.
        """
        rows, columns = (torch.arange(size, device=part.device) for size in self.shape)
        if shard is not None:
            rows, columns = (
                places[shard.begin : shard.end] if dim == shard.dim else places
                for dim, places in enumerate((rows, columns))
            )
        scale = self.scale.to(part.device, torch.float32)
        num_rows = max(1, _PIECE_VALUES // columns.numel())
        for begin, stored in zip(range(0, rows.numel(), num_rows), part.split(num_rows), strict=True):
            yield begin, stored.float().mul_(self._expand(scale, rows[begin : begin + num_rows], columns))

    def _expand(self, scale: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return the scales of these rows and columns, to be multiplied with their values by broadcasting."""
        if scale.numel() == 1:
            return scale.reshape(())
        if self.has_blocks:
            assert self.block is not None, "only a scheme with blocks has their scales"
            return scale[rows // self.block[0]][:, columns // self.block[1]]
        return scale.reshape(-1)[rows].unsqueeze(1)

    def _list_shapes(self) -> Iterator[tuple[int, ...]]:
        """Yield the shapes that a scale may have."""
        yield from ((), (1,), self.shape[:1], (self.shape[0], 1))
        if self.block is not None:
            yield _count_blocks(self.shape, self.block)


def _count_blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def list_companions(name: str) -> Iterator[str]:
    """Name the scales of activations that a layer may have beside its weight `name`.

    They have no use: in fp8 each row gets a scale of its own values, which no calibration can better.
    """
    layer = name.removesuffix(".weight")
    yield from (f"{layer}.input_scale", f"{layer}.activation_scale")
