"""Runs the Triton kernels on the GPU where there is one, in Triton's interpreter (numpy, on the CPU) elsewhere."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def _use_interpreter() -> None:
    """Must run before toka_engine.model.kernels is imported: Triton decides when a kernel is defined."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor: Any, scope: Any) -> None:
        # numpy no longer turns an array of one element into an int, on which Triton 3.6 relies for range().
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index_too


if not torch.cuda.is_available():
    _use_interpreter()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)
