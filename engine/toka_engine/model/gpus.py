"""Decides which GPU a rank takes, and which GPUs cannot serve, from facts about them. Pure: `devices` asks the driver.

Every rank decides from the same facts, so all of them refuse with the same sentence, before weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toka_engine.config import EngineConfig, describe_sizes
from toka_engine.errors import DeviceUnavailableError

_FIRST_WITH_BFLOAT16 = (8, 0)
"""The first compute capability whose tensor cores multiply bfloat16, the only dtype of our kernels."""
_MIN_FREE_BYTES, _MIN_FREE_SHARE = 512 << 20, 0.01
"""An engine that fits its KV cache leaves so much of a GPU, which is too little for a second one to start with."""
_CONTEXT_BYTES = 1 << 30
"""Upper bound of what a process takes on a GPU before it has allocated anything."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A visible GPU. Its index counts visible ones, in the order of CUDA_VISIBLE_DEVICES."""

    index: int
    name: str
    uuid: str
    capability: tuple[int, int]
    num_processors: int
    total_bytes: int

    @property
    def is_slice(self) -> bool:
        """Whether it is a MIG slice: the driver names its profile, as in "NVIDIA H100 80GB HBM3 MIG 1g.10gb"."""
        return " MIG " in self.name

    @property
    def model(self) -> tuple[str, tuple[int, int], int]:
        """The properties that are equal for GPUs which run the same kernels with the same launch configs."""
        return self.name, self.capability, self.num_processors

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.uuid})"


def choose_gpu(gpus: Sequence[Gpu], config: EngineConfig, index: int, visible: str = "") -> Gpu:
    """Return the GPU of the rank that has number `index` among all ranks.

    `visible`: what else the sentence about too few of them says. Raises DeviceUnavailableError.
    """
    num_ranks = config.num_ranks
    if len(gpus) < num_ranks:
        sees_slice = any(gpu.is_slice for gpu in gpus)
        raise DeviceUnavailableError(
            f"{describe_sizes(config)} needs {num_ranks} GPUs, "
            f"{len(gpus)} can be used on this machine{visible}"
            + (" (a process can use one MIG slice, so several ranks need whole GPUs)" if sees_slice else "")
        )
    taken = gpus[:num_ranks]
    for gpu in taken:
        _check_capability(gpu)
    parts = [(config.pp_size, "pp_size"), (config.tp_size, "tp_size")]
    if sizes := [f"{name}={size}" for size, name in parts if size > 1]:
        _check_alike(taken, config.pp_size * config.tp_size, " x ".join(sizes))
    return gpus[index]


def list_unlike(gpus: Sequence[Gpu], config: EngineConfig) -> list[Gpu]:
    """Return the GPUs of the ranks that are not like the first one: replicas may differ, and then serve unevenly."""
    taken = gpus[: config.num_ranks]
    return [gpu for gpu in taken if gpu.model != taken[0].model]


def check_free(gpu: Gpu, free_bytes: int) -> None:
    """Raise DeviceUnavailableError if other processes leave too little of `gpu` for an engine to start."""
    if free_bytes < _MIN_FREE_BYTES + gpu.total_bytes * _MIN_FREE_SHARE:
        raise DeviceUnavailableError(
            f"{gpu} has {free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free: another process uses it, "
            "perhaps a second engine; end that one, or choose other GPUs with CUDA_VISIBLE_DEVICES"
        )


def count_foreign_bytes(gpu: Gpu, free_bytes: int) -> int:
    """Return about how much other processes use of `gpu`, when this one has not allocated anything yet."""
    used = gpu.total_bytes - free_bytes
    return used if used > _CONTEXT_BYTES else 0


def _check_capability(gpu: Gpu) -> None:
    if gpu.capability < _FIRST_WITH_BFLOAT16:
        major, minor = gpu.capability
        needed = "{}.{}".format(*_FIRST_WITH_BFLOAT16)
        raise DeviceUnavailableError(
            f"{gpu} has compute capability {major}.{minor} and no bfloat16: {needed} is needed; device=cpu "
            "does without the GPU"
        )


def _check_alike(gpus: Sequence[Gpu], num_ranks: int, sizes: str) -> None:
    """The ranks of a replica must take the same branches, some of which depend on the GPU."""
    for begin in range(0, len(gpus), num_ranks):
        first = gpus[begin]
        for gpu in gpus[begin : begin + num_ranks]:
            if gpu.is_slice:
                raise DeviceUnavailableError(
                    f"{sizes} needs whole GPUs: {gpu} is a MIG slice, which reaches no other GPU's memory"
                )
            if gpu.model != first.model:
                raise DeviceUnavailableError(f"{sizes} needs GPUs of one model: {first} is unlike {gpu}")
