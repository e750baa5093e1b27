"""The one place where a device and its backend are chosen."""

from __future__ import annotations

from pathlib import Path

import torch

from toka_engine.config import EngineConfig
from toka_engine.errors import ConfigError, DeviceUnavailableError
from toka_engine.messages import RankInfo
from toka_engine.model.backend import Backend
from toka_engine.model.ranks import Ranks, SingleRank

_FIRST_WITH_BFLOAT16 = (8, 0)
"""The first compute capability whose tensor cores multiply bfloat16, the only dtype of our kernels."""


def find_device(config: EngineConfig, index: int = 0) -> torch.device:
    """Return the device that `config.device` means; of several GPUs `index`, which becomes the process's current one.

    Raises DeviceUnavailableError, also for a GPU without bfloat16 and for fewer GPUs than ranks.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = _take_gpu(config, index)
        _check_has_bfloat16(device)
        return device
    if config.device == "cuda":
        raise DeviceUnavailableError("device=cuda, but no CUDA device can be used on this machine")
    return torch.device("cpu")


def _take_gpu(config: EngineConfig, index: int) -> torch.device:
    if config.num_ranks == 1:
        return torch.device("cuda")
    num_gpus = torch.cuda.device_count()
    if num_gpus < config.num_ranks:
        raise DeviceUnavailableError(
            f"dp_size={config.dp_size} x tp_size={config.tp_size} needs {config.num_ranks} GPUs, "
            f"{num_gpus} can be used on this machine"
        )
    # Before anything else touches CUDA, or this rank would hold memory on the first GPU, too.
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_has_bfloat16(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _FIRST_WITH_BFLOAT16:
        name, needed = torch.cuda.get_device_name(device), "{}.{}".format(*_FIRST_WITH_BFLOAT16)
        raise DeviceUnavailableError(
            f"device={name} has compute capability {major}.{minor} and no bfloat16: {needed} is needed; device=cpu "
            "does without the GPU"
        )


def connect_ranks(config: EngineConfig, rank: RankInfo, rendezvous: Path) -> Ranks:
    """Return the tensor parallel ranks that share a replica with `rank`, once they have met in `rendezvous`.

    Raises ConfigError where the device cannot do it yet, PeerClosedError.
    """
    if rank.tp_size == 1:
        return SingleRank()
    if find_device(config).type != "cpu":
        raise ConfigError(f"tp_size={rank.tp_size} needs device=cpu: ranks on GPUs are not built yet")
    from toka_engine.model.cpu.gloo_ranks import GlooRanks

    return GlooRanks(rendezvous / f"dp{rank.dp_rank}", rank.tp_rank, rank.tp_size)


def select_backend(device: torch.device, config: EngineConfig, ranks: Ranks) -> Backend:
    """Make the backend of `device`. Imports what only that device needs, and decides where its kernels are looked for.

    Raises ConfigError, StorageError.
    """
    backend = _make_cuda_backend(device) if device.type == "cuda" else _make_cpu_backend(ranks)
    if not config.torch_compile:
        return backend
    from toka_engine.model.torch_compile.inductor_cache import choose_compile_cache

    choose_compile_cache()
    from toka_engine.model.torch_compile.backend import CompiledBackend

    return CompiledBackend(backend, device, config.torch_compile_config)


def _make_cpu_backend(ranks: Ranks) -> Backend:
    from toka_engine.model.cpu.backend import CpuBackend

    return CpuBackend(ranks)


def _make_cuda_backend(device: torch.device) -> Backend:
    from toka_engine.model.cuda.backend import CudaBackend
    from toka_engine.model.cuda.triton_cache import use_built

    major, minor = torch.cuda.get_device_capability(device)
    use_built(10 * major + minor)
    return CudaBackend(10 * major + minor)
