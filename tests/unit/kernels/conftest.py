"""Runs the Triton kernels in Triton's interpreter (numpy, on the CPU), or with TOKA_TEST_KERNELS=gpu on the GPU."""

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
    _mend_rounding_to_fp8(interpreter)
    _patch_the_language_once(interpreter)


def _patch_the_language_once(interpreter: Any) -> None:
    """Spare device functions what their launch has done: Triton 3.6 looks through its whole language at each of their
    calls for functions to replace, a third of a test's time, and finds that all of them are."""
    patch, tl = interpreter._patch_lang, interpreter.tl

    def patch_unless_done(function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in seen):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_unless_done


def _mend_rounding_to_fp8(interpreter: Any) -> None:
    """Round to e4m3 as a GPU does: Triton 3.6 loses the carry where rounding up reaches the next power of two."""
    convert = interpreter._convert_float

    def convert_by_torch(values: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if (from_dtype.name, to_dtype.name) != ("fp32", "fp8e4nv"):
            return convert(values, from_dtype, to_dtype, rounding_mode)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert_by_torch


ON_GPU = os.environ.get("TOKA_TEST_KERNELS") == "gpu"
if not ON_GPU:
    _use_interpreter()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)
