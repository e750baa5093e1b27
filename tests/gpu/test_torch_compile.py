"""torch_compile=T on the GPU: the rule of test_parity, and nothing left to compile once the engine is ready."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.callback import callback_handler

from tests.gpu.test_parity import FAMILIES, check, drive, generate, make, prompts_of

MODES = ["default", "max-autotune-no-cudagraphs"]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make(request.param, folder).cuda(), folder


@pytest.mark.parametrize("use_cudagraphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_logits_are_as_close_to_fp32_as_transformers_bf16(pair, mode, use_cudagraphs) -> None:
    model, folder = pair
    settings = {"torch_compile": True, "torch_compile_config": mode, "use_cudagraphs": use_cudagraphs}
    prompts = prompts_of(5, 70)
    check(model, prompts, *generate(drive(folder, **settings), prompts))


def test_nothing_compiles_after_the_warm_up_whatever_the_number_of_rows(pair) -> None:
    _, folder = pair
    driver = drive(folder, torch_compile=True)
    assert driver.worker.runner.model.regions.num_graphs == 2  # many rows, and one
    seen: list[Any] = []
    callback_handler.register_start_callback(seen.append)
    try:
        for count in (1, 2, 7, 40, 41, 300):
            driver.reset()
            prompts = prompts_of(count, 14)
            driver.prefill(dict(enumerate(prompts)), **driver.add_slots(list(range(count))))
            driver.decode(list(range(count)))
            driver.decode([0])
    finally:
        callback_handler.remove_start_callback(seen.append)
    assert not seen
