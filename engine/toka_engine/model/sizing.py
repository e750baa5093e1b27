"""Chooses dtype and sizes: what the user set, else what fits the device and the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from toka_engine.config import EngineConfig
from toka_engine.errors import ConfigError, OutOfMemoryError
from toka_engine.model.memory import choose_num_pages, read_limit_bytes
from toka_engine.model.model_config import ModelConfig

logger = logging.getLogger("toka.model")

_CPU_TOKENS_PER_FORWARD, _CPU_SEQS = 128, 256
_GPU_TOKENS_PER_FORWARD, _GPU_SEQS = 8192, 4096
TOKEN_ID_BYTES = 4
"""Bytes of a token's id, stored with its keys and values."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Final sizes of the worker, as `WorkerReady` reports them."""

    num_pages: int
    page_size: int
    max_seqs: int
    max_tokens_per_forward: int
    max_pages_per_seq: int


def choose_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes with it, float32 elsewhere, unless the user set it. Raises ConfigError."""
    match config.dtype:
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32
        case "auto":
            return torch.bfloat16 if device.type == "cuda" or _has_cpu_bfloat16() else torch.float32
        case other:
            raise ConfigError(f"dtype={other!r} is not one of auto, bfloat16, float32")


def choose_fp8(config: EngineConfig, model: ModelConfig, has_fp8: bool, dtype: torch.dtype) -> bool:
    """Whether linear layers compute in fp8: where the user or the checkpoint says so and the device `has_fp8`."""
    is_stored = model.quantization is not None
    if not (config.quantization == "fp8" or (config.quantization == "auto" and is_stored)):
        return False
    if has_fp8 and dtype == torch.bfloat16:
        return True
    if not is_stored:  # of a checkpoint in fp8 the worker tells how many weights it has dequantised
        computed = str(dtype).removeprefix("torch.")
        logger.warning("event=no_fp8 key=quantization=fp8 reason=device_or_dtype_without_fp8 computed=%s", computed)
    return False


def choose_cache_dtype(config: EngineConfig, has_fp8: bool, dtype: torch.dtype) -> torch.dtype:
    """Return the KV cache's dtype: the model's `dtype`, or e4m3 where the user asks for it and the device `has_fp8`."""
    if config.kv_cache_dtype == "auto":
        return dtype
    if has_fp8 and dtype == torch.bfloat16:
        return torch.float8_e4m3fn
    stored = str(dtype).removeprefix("torch.")
    logger.warning("event=no_fp8 key=kv_cache_dtype=fp8 reason=device_or_dtype_without_fp8 stored=%s", stored)
    return dtype


def _has_cpu_bfloat16() -> bool:
    """Whether this CPU computes bfloat16 faster than float32."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities.startswith("AVX512") and bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def choose_step_sizes(config: EngineConfig, is_gpu: bool) -> tuple[int, int]:
    """Return the most sequences and tokens of a forward: what the user set, else the device's default."""
    max_seqs = config.max_seqs_per_forward or (_GPU_SEQS if is_gpu else _CPU_SEQS)
    max_tokens = config.max_tokens_per_forward or (_GPU_TOKENS_PER_FORWARD if is_gpu else _CPU_TOKENS_PER_FORWARD)
    return max_seqs, max_tokens


def choose_sizes(
    config: EngineConfig, model: ModelConfig, device: torch.device, kv_bytes_per_token: int, available: int
) -> Sizes:
    """Sizes for a model that is loaded already, with `available` bytes left. Raises ConfigError, OutOfMemoryError."""
    is_gpu = device.type == "cuda"
    page_size = config.page_size
    max_seqs, max_tokens = choose_step_sizes(config, is_gpu)
    for name, value in (
        ("page_size", page_size),
        ("max_seqs", max_seqs),
        ("max_tokens_per_forward", max_tokens),
    ):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    longest = min(model.max_positions, config.max_num_tokens_per_request or model.max_positions)
    pages_of_longest = -(-longest // page_size)
    bytes_per_page = (kv_bytes_per_token + TOKEN_ID_BYTES) * page_size
    if not is_gpu:
        available //= config.dp_size  # replicas share one memory, and grow together
    if is_gpu and config.kv_cache_num_tokens is None:
        num_pages = available // bytes_per_page  # an upper bound, see cuda.memory_fit
    else:
        min_pages = min(pages_of_longest, 256)
        num_pages = choose_num_pages(available, bytes_per_page, min_pages, config.kv_cache_num_tokens, page_size)
    if num_pages < 1 or num_pages * bytes_per_page > available:
        num_pages = max(1, num_pages)
        raise OutOfMemoryError(
            f"a KV cache of {num_pages * page_size} tokens takes {num_pages * bytes_per_page / 1e9:.1f} GB, "
            f"{max(0, available) / 1e9:.1f} GB of memory are available beside the weights; "
            f"kv_cache_num_tokens may be up to {max(0, available // bytes_per_page) * page_size}"
        )
    return Sizes(num_pages, page_size, max_seqs, max_tokens, min(pages_of_longest, num_pages))


def read_available_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on `device`."""
    if device.type != "cuda":
        return read_limit_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free
