"""A checkpoint's scales of an 8-bit KV cache make what the cache holds smaller, and change nothing else.

They are folded into the weights, so a CPU shows it, whose cache stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toka_engine.config import EngineConfig
from toka_engine.model import worker
from toka_engine.model.kv_scales import round_up
from toka_engine.model.linear import LinearParameters
from toka_engine.model.sizing import choose_cache_dtype

from tests.model.driving import Driver, load
from tests.model.test_loader import edit_weights, refuse
from tests.model.thread_ranks import run_ranks

MakeTiny = Callable[..., tuple[Any, Path]]
E4M3 = torch.float8_e4m3fn
IDS = list(range(3, 40))
FORMS = {
    "compressed-tensors": "model.layers.{}.self_attn.{}_scale",
    "modelopt": "model.layers.{}.self_attn.{}_proj.{}_scale",
    "older compressed-tensors": "model.layers.{}.self_attn.{}_proj.output_scale",
}


@pytest.fixture
def with_fp8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are loaded as for a device whose cache holds 8-bit floats."""
    monkeypatch.setattr(worker, "choose_cache_dtype", lambda *arguments: E4M3)


def add_scales(folder: Path, keys: Any, values: Any, form: str = "compressed-tensors") -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            for which, scale in (("k", keys), ("v", values)):
                tensors[FORMS[form].format(layer, which, which)] = torch.tensor(scale, dtype=torch.float32)

    edit_weights(folder, change)


def prefill(driver: Driver) -> torch.Tensor:
    driver.prefill({0: IDS})
    driver.decode([0])
    return driver.logits


def split_cache(driver: Driver) -> tuple[torch.Tensor, ...]:
    """Keys and values of all layers."""
    attention = driver.worker.runner.attention
    return attention._cache.unflatten(-1, (2, -1)).unbind(-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_logits_stay_and_the_cache_holds_smaller_numbers(
    make_tiny: MakeTiny, with_fp8_cache: None, family: str, form: str
) -> None:
    folder = make_tiny(family)[1]
    plain = Driver(load(folder))
    expected = prefill(plain)
    add_scales(folder, 3.0, [0.1, 0.2], form)
    scaled = Driver(load(folder))
    torch.testing.assert_close(prefill(scaled), expected, atol=0, rtol=0)
    (keys, values), (expected_keys, expected_values) = (split_cache(driver) for driver in (scaled, plain))
    assert torch.equal(keys * 4, expected_keys), "rounded up to a power of 2"
    assert torch.equal(values / 4, expected_values), "the larger head counts"


def test_ranks_fold_their_parts(make_tiny: MakeTiny, with_fp8_cache: None) -> None:
    folder = make_tiny("Qwen2")[1]
    expected = prefill(Driver(load(folder)))
    add_scales(folder, 3.0, 0.1)
    found = run_ranks(2, lambda ranks: prefill(Driver(load(folder, ranks, tp_size=2))))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)  # each has half the vocabulary


def test_without_such_a_cache_scales_have_no_use(make_tiny: MakeTiny, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_tiny()[1]
    expected = prefill(Driver(load(folder)))
    add_scales(folder, 3.0, 0.1)
    with caplog.at_level("WARNING", "toka.model"):
        assert torch.equal(prefill(Driver(load(folder))), expected)
    assert "name=model.layers.*.self_attn.k_scale count=2" in caplog.text


def test_missing_scales_are_1_and_are_told_once(
    make_tiny: MakeTiny, with_fp8_cache: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny()[1]
    with caplog.at_level("WARNING", "toka.model"):
        load(folder)
    assert [record.getMessage() for record in caplog.records] == ["event=no_kv_scales count=4 used=1.0"]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), [], 1e-30, 1e30])
def test_what_is_no_scale_is_refused_by_the_tensors_name(make_tiny: MakeTiny, with_fp8_cache: None, scale: Any) -> None:
    folder = make_tiny()[1]
    add_scales(folder, 1.0, scale)
    refuse(folder, "model.layers.0.self_attn.v_scale")


@pytest.mark.parametrize(("scale", "power"), [(1.0, 1), (1.001, 2), (0.26, 0.5), (0.25, 0.25), ([0.1, 3.0], 4)])
def test_a_scale_becomes_the_next_power_of_2(scale: Any, power: float) -> None:
    assert round_up(torch.tensor(scale)) == power


def test_weights_of_8_bit_floats_get_other_scales() -> None:
    values = torch.arange(12.0).reshape(4, 3).to(E4M3)
    scaled = LinearParameters(values, torch.ones(4), torch.ones(4)).scale_outputs((1, 2, 1), (2.0, 1.0, 0.25))
    assert scaled.weight is values
    assert scaled.scale is not None
    assert scaled.scale.tolist() == [2.0, 1.0, 1.0, 0.25]
    assert scaled.bias is not None
    assert scaled.bias.tolist() == [2.0, 1.0, 1.0, 0.25]


@pytest.mark.parametrize(
    ("has_fp8", "dtype", "expected"),
    [(True, torch.bfloat16, E4M3), (False, torch.bfloat16, None), (True, torch.float32, None)],
)
def test_a_device_without_8_bit_floats_keeps_its_dtype_and_says_so(
    has_fp8: bool, dtype: torch.dtype, expected: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "toka.model"):
        assert choose_cache_dtype(EngineConfig(kv_cache_dtype="fp8"), has_fp8, dtype) == (expected or dtype)
    assert ("event=no_fp8 key=kv_cache_dtype=fp8" in caplog.text) == (expected is None)
    assert choose_cache_dtype(EngineConfig(), has_fp8, dtype) == dtype
