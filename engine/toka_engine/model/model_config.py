"""Reads a model folder's config.json into one checked object, without transformers (importing it costs seconds).

Understands the older form (rope_theta, rope_scaling) and transformers 5's rope_parameters. Whatever the engine cannot
honour is refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toka_engine.errors import ModelInvalidError, ModelNotFoundError
from toka_engine.model.config_fields import MAX_SIZE, ConfigFields
from toka_engine.model.quantization import Quantization, read_quantization

_MAX_CONFIG_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: its type, base and the parameters of its type."""

    kind: str
    theta: float
    parameters: dict[str, Any]
    max_positions: int
    """config.json's max_position_embeddings."""
    original_max_positions: int
    """Positions of the pretraining, for the types that scale from them."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The checked fields of config.json that models use."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    has_attention_bias: bool
    has_mlp_bias: bool
    has_tied_embeddings: bool
    dtype: str
    """bfloat16, float16 or float32, as stored."""
    quantization: Quantization | None
    """The scheme of the weights that are stored as 8-bit floats."""
    fields: ConfigFields
    """All of config.json, for what only one model's file asks for."""


def read_model_config(folder: Path) -> ModelConfig:
    """Read and check `folder`/config.json. Raises ModelNotFoundError, ModelInvalidError."""
    return parse_model_config(ConfigFields(_read_json(folder), folder / "config.json"))


def parse_model_config(fields: ConfigFields) -> ModelConfig:
    """Check the fields of a config.json. Raises ModelInvalidError."""
    architecture = _read_architecture(fields)
    _refuse_unsupported(fields)
    num_heads = fields.size("num_attention_heads")
    hidden_size = fields.size("hidden_size")
    head_dim = fields.size("head_dim", hidden_size // num_heads)
    num_kv_heads = fields.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(f"num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}")
    if head_dim % 2:
        raise fields.error(f"head_dim={head_dim} is odd")
    rope = _read_rope(fields)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.size("vocab_size"),
        max_positions=_count_positions(rope),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        has_attention_bias=fields.flag("attention_bias"),
        has_mlp_bias=fields.flag("mlp_bias"),
        has_tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_read_dtype(fields),
        quantization=read_quantization(fields),
        fields=fields,
    )


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelNotFoundError(f"the model folder {folder} does not exist")
    path = folder / "config.json"
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelInvalidError(f"{path}: larger than {_MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelInvalidError(f"{folder} has no config.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelInvalidError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelInvalidError(f"{path}: not a JSON object")
    return value


def _read_architecture(fields: ConfigFields) -> str:
    names = fields.fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error(f"architectures must hold one name, not {names!r:.80}")
    return names[0]


def _refuse_unsupported(fields: ConfigFields) -> None:
    fields.require("use_sliding_window", False)
    kinds = fields.fields.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise fields.error(f"layer_types={kinds!r:.80} is not supported (full_attention is, in every layer)")


def _read_dtype(fields: ConfigFields) -> str:
    dtype = fields.fields.get("dtype") or fields.fields.get("torch_dtype") or "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise fields.error(f"dtype={dtype!r:.80} is not supported")
    return str(dtype)


def _read_rope(fields: ConfigFields) -> RopeConfig:
    parameters = fields.fields.get("rope_parameters") or fields.fields.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise fields.error("rope_parameters must be an object")
    nested = ConfigFields(parameters, fields.path)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str):
        raise fields.error(f"rope_type={kind!r:.80} is not a name")
    for source in (nested, fields):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error("partial_rotary_factor other than 1 is not supported")
    max_positions = fields.size("max_position_embeddings", 2048)
    original = fields.size(
        "original_max_position_embeddings", nested.size("original_max_position_embeddings", max_positions)
    )
    return RopeConfig(
        kind=kind,
        theta=nested.number("rope_theta", fields.number("rope_theta", 10_000.0)),
        parameters=_check_parameters(nested, kind),
        max_positions=max_positions,
        original_max_positions=original,
    )


_NUMBERS_OF_KIND: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": (),
}
_OPTIONAL_NUMBERS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _check_parameters(nested: ConfigFields, kind: str) -> dict[str, Any]:
    if kind not in _NUMBERS_OF_KIND:
        raise nested.error(f"rope_type={kind!r:.80} is not supported ({', '.join(_NUMBERS_OF_KIND)} are)")
    checked: dict[str, Any] = {}
    for name in _NUMBERS_OF_KIND[kind]:
        checked[name] = nested.number(name, -1.0)
    for name in _OPTIONAL_NUMBERS:
        if nested.fields.get(name) is not None:
            checked[name] = nested.number(name, 1.0)
    if kind == "llama3" and checked["high_freq_factor"] <= checked["low_freq_factor"]:
        raise nested.error("high_freq_factor must be greater than low_freq_factor")
    if kind == "yarn":
        checked["truncate"] = nested.flag("truncate", True)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            checked[name] = _read_factors(nested, name)
    return checked


def _read_factors(nested: ConfigFields, name: str) -> list[float]:
    values = nested.fields.get(name)
    if not isinstance(values, list) or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf for value in values
    ):
        raise nested.error(f"{name} must be a list of positive numbers")
    return [float(value) for value in values]


def _count_positions(rope: RopeConfig) -> int:
    """Positions that the model can use: dynamic scaling reaches `factor` times as far as it says."""
    if rope.kind == "dynamic":
        return min(int(rope.max_positions * rope.parameters["factor"]), MAX_SIZE)
    return rope.max_positions
