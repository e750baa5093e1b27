"""The one place where a device and its implementations are chosen: a new one adds a table of `Ops`, and a line here."""

from __future__ import annotations

import torch

from toka_engine.config import EngineConfig
from toka_engine.errors import DeviceUnavailableError
from toka_engine.model.ops import Ops

_FIRST_WITH_BFLOAT16 = (8, 0)
"""The first compute capability whose tensor cores multiply it: the only type of our kernels."""


def find_device(config: EngineConfig) -> torch.device:
    """The device that `config.device` means here. Raises DeviceUnavailableError, also for a GPU without bfloat16."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        _check_has_bfloat16(device)
        return device
    if config.device == "cuda":
        raise DeviceUnavailableError("device=cuda, but no CUDA device can be used on this machine")
    return torch.device("cpu")


def _check_has_bfloat16(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _FIRST_WITH_BFLOAT16:
        name, needed = torch.cuda.get_device_name(device), "{}.{}".format(*_FIRST_WITH_BFLOAT16)
        raise DeviceUnavailableError(
            f"device={name} has compute capability {major}.{minor} and no bfloat16: {needed} is needed; device=cpu "
            "does without the GPU"
        )


def select_ops(device: torch.device, config: EngineConfig) -> Ops:
    """The table of `device`. Imports what only that device needs, and decides where its kernels are looked for.

    Raises ConfigError, StorageError.
    """
    if device.type == "cuda":
        from toka_engine.model.cuda.backend import make_ops as make_cuda_ops
        from toka_engine.model.cuda.triton_cache import use_built

        major, minor = torch.cuda.get_device_capability(device)
        use_built(10 * major + minor)
        ops = make_cuda_ops(10 * major + minor)
    else:
        from toka_engine.model.cpu.backend import make_ops

        ops = make_ops()
    if not config.torch_compile:
        return ops
    from toka_engine.model.torch_compile.inductor_cache import choose_compile_cache

    choose_compile_cache()
    from toka_engine.model.torch_compile.compiled_model import compile_ops

    return compile_ops(ops, device, config)
