"""The one place where a device and its implementations are chosen: a new one adds a table of `Ops`, and a line here."""

from __future__ import annotations

import torch

from toka_engine.config import EngineConfig
from toka_engine.errors import DeviceUnavailableError
from toka_engine.model.ops import Ops


def find_device(config: EngineConfig) -> torch.device:
    """The device that `config.device` means here. Raises DeviceUnavailableError."""
    has_cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise DeviceUnavailableError("device=cuda, but no CUDA device can be used on this machine")
    return torch.device("cuda" if has_cuda else "cpu")


def select_ops(device: torch.device, config: EngineConfig) -> Ops:
    """The table of `device`. Imports what only that device needs, and decides where its kernels are looked for.

    Raises ConfigError, StorageError.
    """
    if device.type == "cuda":
        from toka_engine.model.ahead.cache import use_built
        from toka_engine.model.cuda_ops import make_ops as make_cuda_ops

        major, minor = torch.cuda.get_device_capability(device)
        use_built(10 * major + minor)
        ops = make_cuda_ops(10 * major + minor)
    else:
        from toka_engine.model.cpu_ops import make_ops

        ops = make_ops()
    if not config.torch_compile:
        return ops
    from toka_engine.model.compile_cache import choose_compile_cache

    choose_compile_cache()
    from toka_engine.model.compilation import compile_ops

    return compile_ops(ops, device, config)
