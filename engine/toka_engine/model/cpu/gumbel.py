"""Gumbel noise from a counter: a pure function of (seed, position, token).

The hash is 32-bit integer mixing with two multiplications per round (constants by C. Wellons' search for
low-bias mixers); one round per token after the row's key has been mixed in, one more to break linearity.
"""

from __future__ import annotations

import torch

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_MASK_16, _MASK_17 = 0xFFFF, 0x1FFFF
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mix int32 in place. The masks make the arithmetic shifts logical."""
    x ^= (x >> 16).bitwise_and_(_MASK_16)
    x *= _FIRST
    x ^= (x >> 15).bitwise_and_(_MASK_17)
    x *= _SECOND
    x ^= (x >> 16).bitwise_and_(_MASK_16)
    return x


def _keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 keys [n] per row from seeds [n] int64 and positions [n]; splitmix64's finaliser."""
    z = seeds + (positions.long() + 1) * _GOLDEN
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - (1 << 64))
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return z.to(torch.int32), (z >> 32).to(torch.int32)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, width: int, first: int = 0) -> torch.Tensor:
    """Return [n, width] float32 standard Gumbel noise for seeds [n] int64, positions [n] and tokens from `first` on."""
    low, high = _keys(seeds, positions)
    bits = torch.arange(first, first + width, dtype=torch.int32)[None, :] ^ low[:, None]
    bits = _mix(bits)
    bits += high[:, None]
    bits = _mix(bits)
    # E = -log(1 - u) is exponential and -log(E) Gumbel; the winner has a small E, so u must be fine near zero, where
    # the magnitude of an integer is exact.
    uniforms = bits.to(torch.float32).abs_().mul_(2.0**-31).clamp_(2.0**-33, 1.0 - 2.0**-24)
    return uniforms.neg_().log1p_().neg_().log_().neg_()
