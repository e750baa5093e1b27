"""RMSNorm in plain torch: what a CPU runs, and what torch.compile fuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor,  # [rows, width]
    weight: torch.Tensor,  # [width]
    eps: float,
) -> torch.Tensor:
    """Normalise each row: [rows, width]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor,  # [rows, width]
    residual: torch.Tensor,  # [rows, width], written
    weight: torch.Tensor,  # [width]
    eps: float,
) -> torch.Tensor:
    """Add x to `residual` in place and normalise the sum: [rows, width]."""
    return F.rms_norm(residual.add_(x), weight.shape, weight, eps)
