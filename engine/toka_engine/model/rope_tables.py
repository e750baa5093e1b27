"""Rotary position embedding: the table of cosines and sines for each scaling type.

Sources: RoPE (Su et al. 2021); linear interpolation (Chen et al. 2023); dynamic NTK (Reddit, bloc97 and emozilla);
YaRN (Peng et al. 2023); LongRoPE (Ding et al. 2024); Llama 3.1's frequency bands.

A row's rotation depends on its position alone, never on what else is in the batch, because pages are shared between
sequences. Where a type looks at the sequence's length (dynamic, longrope), the length is that at which the position was
written, `position + 1`: the rule that step-by-step generation follows.
"""

from __future__ import annotations

import math

import torch

from toka_engine.errors import ModelInvalidError
from toka_engine.model.model_config import RopeConfig


def build_cos_sin(rope: RopeConfig, head_dim: int, max_positions: int) -> torch.Tensor:
    """Return [max_positions, head_dim] fp32: cosines in the first half, sines in the second."""
    positions = torch.arange(max_positions, dtype=torch.float32)
    match rope.kind:
        case "default":
            angles, scale = torch.outer(positions, _frequencies(rope.theta, head_dim)), 1.0
        case "linear":
            frequencies = _frequencies(rope.theta, head_dim) / rope.parameters["factor"]
            angles, scale = torch.outer(positions, frequencies), 1.0
        case "llama3":
            angles, scale = torch.outer(positions, _llama3_frequencies(rope, head_dim)), 1.0
        case "dynamic":
            angles, scale = _dynamic_angles(rope, head_dim, positions), 1.0
        case "yarn":
            frequencies, scale = _yarn_frequencies(rope, head_dim)
            angles = torch.outer(positions, frequencies)
        case "longrope":
            angles, scale = _longrope_angles(rope, head_dim, positions)
        case _:
            raise ModelInvalidError(f"rope_type={rope.kind!r} is not supported")
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)


def _exponents(head_dim: int) -> torch.Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _frequencies(theta: float, head_dim: int) -> torch.Tensor:
    wavelengths: torch.Tensor = theta ** _exponents(head_dim)
    return wavelengths.reciprocal()


def _llama3_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Short wavelengths stay, long ones are stretched by `factor`, those between are blended."""
    parameters, length = rope.parameters, rope.original_max_positions
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    frequencies = _frequencies(rope.theta, head_dim)
    turns = length * frequencies / (2 * math.pi)  # over the pretraining length
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    stretched: torch.Tensor = frequencies / float(parameters["factor"])
    return torch.lerp(stretched, frequencies, keep)


def _dynamic_angles(rope: RopeConfig, head_dim: int, positions: torch.Tensor) -> torch.Tensor:
    factor = rope.parameters["factor"]
    lengths = (positions.double() + 1).clamp(min=rope.max_positions)
    growth = factor * lengths / rope.max_positions - (factor - 1)
    bases = rope.theta * growth ** (head_dim / (head_dim - 2))  # [max_positions]
    frequencies = 1.0 / bases.float()[:, None] ** _exponents(head_dim)[None, :]
    return torch.mul(positions[:, None], frequencies)


def _yarn_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies and the factor on cosines and sines (the paper's attention temperature)."""
    parameters = rope.parameters
    factor = parameters["factor"]

    def dimension_of(num_rotations: float) -> float:
        turns = rope.original_max_positions / (num_rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = (
        dimension_of(parameters.get("beta_fast", 32.0)),
        dimension_of(parameters.get("beta_slow", 1.0)),
    )
    if parameters["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    plain = _frequencies(rope.theta, head_dim)
    return plain / factor * stretch + plain * (1 - stretch), _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    parameters = rope.parameters
    factor = parameters["factor"]
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])

    def scale_of(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in parameters and "mscale_all_dim" in parameters:
        return scale_of(parameters["mscale"]) / scale_of(parameters["mscale_all_dim"])
    return scale_of(1.0)


def _longrope_angles(rope: RopeConfig, head_dim: int, positions: torch.Tensor) -> tuple[torch.Tensor, float]:
    parameters, original = rope.parameters, rope.original_max_positions
    factors = []
    for name in ("short_factor", "long_factor"):
        if len(parameters[name]) != head_dim // 2:
            raise ModelInvalidError(
                f"rope {name} has {len(parameters[name])} entries, not head_dim/2 = {head_dim // 2}"
            )
        factors.append(torch.tensor(parameters[name], dtype=torch.float32))
    theta = rope.theta ** _exponents(head_dim)
    short, long = (1.0 / (each * theta) for each in factors)
    is_long = (positions + 1 > original)[:, None]
    angles = positions[:, None] * torch.where(is_long, long, short)
    factor = parameters.get("factor", rope.max_positions / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return angles, float(parameters.get("attention_factor", default))
