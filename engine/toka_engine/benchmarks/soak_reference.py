"""Asks the reference about the tokens in which a soak's answers differ: transformers, on the engine's device.

In bfloat16 a logit depends on the batch, and how much depends on the prompt: most places of random prompts are good for
0.3 nats, a few for 3. So a token that the engine in peace finds far less likely may still be a near tie: of two logits,
each as far off its float32 value as one of transformers' is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toka_engine.benchmarks.soak_check import Difference
from toka_engine.config import EngineConfig
from toka_engine.model.devices import find_device
from toka_engine.model.sizing import choose_dtype


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one token."""

    gap: float  # by how much it is less likely than the likeliest one in float32, in nats
    noise: float  # by how much a logit in the engine's type is off its float32 one, at most; a shift of all is none

    @property
    def is_near_tie(self) -> bool:
        return self.gap <= 2 * self.noise


def ask_reference(folder: Path, config: EngineConfig, differences: Sequence[Difference]) -> list[Verdict]:
    """A verdict on each of `differences`. Needs the device's memory: the engine must have ended.

    Raises OSError or ValueError if transformers cannot load the model, RuntimeError if the device has too little memory
    for it, DeviceUnavailableError, ConfigError.
    """
    device = find_device(config)
    exact = _compute_logits(folder, torch.float32, device, differences)
    rounded = _compute_logits(folder, choose_dtype(config, device), device, differences)
    return [
        Verdict(gap=float(want.max() - want[each.token]), noise=_largest_deviation(have - want))
        for each, want, have in zip(differences, exact, rounded, strict=True)
    ]


def _largest_deviation(errors: torch.Tensor) -> float:
    """From their mean: what all logits have in common changes no token."""
    return float((errors - errors.mean()).abs().max())


@torch.inference_mode()
def _compute_logits(
    folder: Path, dtype: torch.dtype, device: torch.device, differences: Sequence[Difference]
) -> list[torch.Tensor]:
    """Logits [vocab] behind each prompt, as float32 on the CPU; prompts one by one, so that no batch changes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    prompts = (torch.tensor([each.prompt], device=device) for each in differences)
    return [model(prompt, logits_to_keep=1).logits[0, -1].float().cpu() for prompt in prompts]
