"""Steps with prompts whose layers are graphs from one attention to the next: the logits follow test_parity's rule.

They are those of the same steps launched kernel by kernel, but for the numbers of rows that GEMMs are padded to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.test_parity import check, drive, generate, make, prompts_of
from tests.model.driving import Driver
from tests.unit.kernels.test_layer_graphs import mixed

KEYS = {"cudagraph_max_prefill_size": 256, "kv_cache_num_tokens": 65536}
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "no decode graphs' sizes": {"cudagraph_max_size": 1},
}


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "Qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make(request.param, folder).cuda(), folder


def test_logits_are_as_close_to_fp32_as_transformers_bf16(pair) -> None:
    model, folder = pair
    prompts = prompts_of(5, 70)
    driver = drive(folder, **KEYS)
    assert driver.worker.runner.layer_graphs is not None
    check(model, prompts, *generate(driver, prompts))


STEPS = [((31, 1), 0), ((70,), 2), ((3, 5, 100), 3), ((250,), 6), ((254,), 7), ((5,), 8), ((), 9), ((128,), 0)]
"""Lengths of a step's prompts, and its decode rows: on both sides of the limit."""


def run_steps(driver: Driver) -> list[torch.Tensor]:
    """The logits of STEPS, twice."""
    logits = []
    for _ in range(2):
        driver.reset()
        random = np.random.default_rng(0)
        for number, (lengths, decode) in enumerate(STEPS):
            new = {10 * number + i: random.integers(3, 1000, size=n).tolist() for i, n in enumerate(lengths)}
            mixed(driver, new, sorted(driver.lengths)[:decode])
            logits.append(driver.logits)
    assert all(each.isfinite().all() for each in logits)
    return logits


@pytest.mark.parametrize("settings", SETTINGS)
def test_mixed_steps_say_what_they_say_without_graphs(pair, settings: str) -> None:
    _, folder = pair
    keys = {**KEYS, **SETTINGS[settings]}
    graphed = run_steps(drive(folder, **keys))
    plain = run_steps(drive(folder, **{**keys, "cudagraph_max_prefill_size": 0}))
    for index, (found, expected) in enumerate(zip(graphed, plain, strict=True)):
        spread, difference = float(expected.std()), float((found - expected).abs().max())
        assert difference <= 0.15 * spread, (index, difference, spread)
        assert torch.equal(found, graphed[index % len(STEPS)]), "the same steps again have the same bits"


def test_steps_in_flight_do_not_disturb_each_other(pair) -> None:
    """Three at once, as an engine has them: the graphs' memory is used again at once."""
    _, folder = pair
    driver = drive(folder, **KEYS)
    expected = run_steps(driver)[-1]
    runner, launched, kept = driver.worker.runner, [], []
    finish = runner.finish

    def finish_late(step: Any) -> Any:
        launched.append(step)
        kept.append(finish(launched.pop(0)) if len(launched) > 2 else None)
        return kept[-1]

    runner.finish = finish_late  # type: ignore[method-assign]
    try:
        found = run_steps(driver)[-1]
    finally:
        runner.finish = finish  # type: ignore[method-assign]
        for step in launched:
            finish(step)
    assert torch.equal(found, expected)
