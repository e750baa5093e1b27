"""The one place where a device and its backend are chosen."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from toka_engine.config import EngineConfig
from toka_engine.control_messages import RankInfo
from toka_engine.errors import ConfigError, DeviceUnavailableError
from toka_engine.model.backend import Backend
from toka_engine.model.gpus import Gpu, check_free, choose_gpu, count_foreign_bytes, list_unlike
from toka_engine.model.model_config import ModelConfig
from toka_engine.model.ranks import Ranks, SingleRank
from toka_engine.model.sizing import choose_dtype
from toka_engine.model.stage_links import StageLinks

logger = logging.getLogger("toka.model")

_GPU_STAGES = "TOKA_GPU_STAGES"
"""The variable with which stages of several ranks run on GPUs, until they have been tried there."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable that says which GPUs a process sees, in which order: a word that names none hides all of them."""


def find_device(config: EngineConfig, index: int = 0) -> torch.device:
    """Return the device that `config.device` means; of several GPUs `index`, which becomes the process's current one.

    Raises DeviceUnavailableError, also for GPUs that cannot serve: too few, too old, or unlike in one replica, and
    ConfigError for what does not run on GPUs.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        if config.pp_size > 1 and config.tp_size > 1 and _GPU_STAGES not in os.environ:
            raise ConfigError(
                f"pp_size={config.pp_size} tp_size={config.tp_size}: pipeline stages of several ranks run on CPUs in "
                "this version, with device=cpu"
            )
        is_one_of_several = config.num_ranks > 1
        if is_one_of_several and index < torch.cuda.device_count():
            # Before anything else touches CUDA, or this rank would hold memory on the first GPU, too.
            torch.cuda.set_device(index)
        choose_gpu(probe_gpus(), config, index, _describe_visible())
        return torch.device("cuda", index) if is_one_of_several else torch.device("cuda")
    if config.device == "cuda":
        raise DeviceUnavailableError(
            f"device=cuda, but no CUDA device can be used on this machine{_describe_visible()}"
        )
    if config.async_tp_threshold is not None:
        raise ConfigError(f"async_tp_threshold={config.async_tp_threshold} has no effect on a CPU")
    if index == 0 and os.environ.get(_VISIBLE, "") not in ("", "-1"):  # those hide GPUs on purpose
        logger.warning("event=no_gpu device=cpu reason=%r", f"no CUDA device can be used{_describe_visible()}")
    return torch.device("cpu")


def _describe_visible() -> str:
    """Return, for a sentence, which GPUs the environment lets this process see; "" if it does not say."""
    return f" ({_VISIBLE}={os.environ[_VISIBLE]!r})" if _VISIBLE in os.environ else ""


def take_device(config: EngineConfig, rank: RankInfo) -> torch.device:
    """Return the device of `rank`, which is this process's current one from now on, with room for an engine.

    Raises DeviceUnavailableError. A worker calls this before anything else that touches a device.
    """
    device = find_device(config, rank.device_index)
    if device.type == "cuda":
        gpus = probe_gpus()
        gpu, (free, _) = gpus[rank.device_index], torch.cuda.mem_get_info(device)
        logger.info("event=gpu index=%d name=%r uuid=%s free_gb=%.1f", gpu.index, gpu.name, gpu.uuid, free / 1e9)
        if unlike := list_unlike(gpus, config) if rank.device_index == 0 else []:
            logger.warning("event=unlike_gpus first=%r others=%r", str(gpus[0]), ", ".join(map(str, unlike)))
        if foreign := count_foreign_bytes(gpu, free):
            logger.warning("event=gpu_in_use index=%d uuid=%s by_others_gb=%.1f", gpu.index, gpu.uuid, foreign / 1e9)
        check_free(gpu, free)
    return device


def probe_gpus() -> list[Gpu]:
    """Ask for the visible GPUs, in the order of CUDA_VISIBLE_DEVICES; makes no context on any of them."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = found.major, found.minor
        uuid = f"GPU-{found.uuid}"
        gpus.append(Gpu(index, found.name, uuid, capability, found.multi_processor_count, found.total_memory))
    return gpus


def connect_ranks(rank: RankInfo, rendezvous: Path, device: torch.device) -> Ranks:
    """Return the tensor parallel ranks that share a stage with `rank`, once they have met in `rendezvous`.

    Raises PeerClosedError, StorageError, DeviceUnavailableError.
    """
    if rank.tp_size == 1:
        return SingleRank()
    meeting = rendezvous / f"dp{rank.dp_rank}_pp{rank.pp_rank}"
    if device.type == "cuda":
        from toka_engine.model.cuda.gpu_ranks import GpuRanks

        return GpuRanks(meeting, rank.tp_rank, rank.tp_size)
    from toka_engine.model.cpu.gloo_ranks import GlooRanks

    return GlooRanks(meeting, rank.tp_rank, rank.tp_size)


def select_backend(
    device: torch.device,
    config: EngineConfig,
    ranks: Ranks,
    model: ModelConfig | None = None,
    links: StageLinks | None = None,
) -> Backend:
    """Make the backend of `device`. Imports what only that device needs, and decides where its kernels are looked for.

    Several ranks on GPUs connect here, to exchange rows of `model`; pipeline stages do, too, by `links`.

    Raises ConfigError, StorageError, DeviceUnavailableError (GPU ranks that cannot reach each other).
    """
    is_gpu = device.type == "cuda"
    backend = (
        _make_cuda_backend(device, config, ranks, model, links)
        if is_gpu
        else _make_cpu_backend(config, ranks, model, links)
    )
    if not config.torch_compile:
        return backend
    from toka_engine.model.torch_compile.inductor_cache import choose_compile_cache

    choose_compile_cache()
    from toka_engine.model.torch_compile.backend import CompiledBackend

    return CompiledBackend(backend, device, config.torch_compile_config)


def _make_cpu_backend(
    config: EngineConfig, ranks: Ranks, model: ModelConfig | None, links: StageLinks | None
) -> Backend:
    from toka_engine.model.cpu.backend import CpuBackend

    if links is None:
        return CpuBackend(ranks)
    from toka_engine.model.cpu.stage_exchange import StageExchange

    assert model is not None, "stages exchange rows of a model"
    dtype = choose_dtype(config, torch.device("cpu"))
    return CpuBackend(ranks, StageExchange.connect(links, config, model, dtype))


def _make_cuda_backend(
    device: torch.device, config: EngineConfig, ranks: Ranks, model: ModelConfig | None, links: StageLinks | None
) -> Backend:
    from toka_engine.model.cuda.backend import CudaBackend
    from toka_engine.model.cuda.gpu_ranks import GpuRanks
    from toka_engine.model.cuda.gpu_stages import connect_stages
    from toka_engine.model.cuda.triton_cache import use_built

    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    use_built(capability)
    if model is None:
        return CudaBackend(capability)
    parallel = ranks.connect(config, model, capability) if isinstance(ranks, GpuRanks) else None
    return CudaBackend(capability, parallel, None if links is None else connect_stages(links, config, model))
