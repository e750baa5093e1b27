"""Models that the tests share: SmolLM2 as converted, and tiny random ones made on demand by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toka_engine.builtin import ensure_builtin

from tests.model.driving import Driver, load

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread: where cores are shared, a second one mostly waits at the barrier of every small kernel."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return ensure_builtin()


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """make_tiny(family, **config) -> (transformers model in fp32, its folder)."""

    def make(family: str = "Llama", **overrides: Any) -> tuple[Any, Path]:
        import transformers

        torch.manual_seed(7)
        config = getattr(transformers, f"{family}Config")(**{**TINY, **overrides})
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts these at 0 and 1
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / "tiny"
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture
def drive_tiny(make_tiny: Callable[..., tuple[Any, Path]]) -> Callable[..., tuple[Any, Driver]]:
    """drive_tiny(family, settings, **config) -> (transformers model, driver of ours on the same weights)."""

    def make(family: str = "Llama", settings: dict[str, Any] | None = None, **overrides: Any) -> tuple[Any, Driver]:
        model, folder = make_tiny(family, **overrides)
        return model, Driver(load(folder, **(settings or {})))

    return make


@pytest.fixture(scope="session")
def _smollm2_drivers(smollm2: Path) -> dict[str, Driver]:
    return {dtype: Driver(load(smollm2, dtype=dtype)) for dtype in ("float32", "bfloat16")}


@pytest.fixture
def smollm2_fp32(_smollm2_drivers: dict[str, Driver]) -> Iterator[Driver]:
    _smollm2_drivers["float32"].reset()
    return _smollm2_drivers["float32"]


@pytest.fixture
def smollm2_bf16(_smollm2_drivers: dict[str, Driver]) -> Driver:
    _smollm2_drivers["bfloat16"].reset()
    return _smollm2_drivers["bfloat16"]
