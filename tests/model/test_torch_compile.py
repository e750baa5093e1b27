"""torch_compile=T: the numbers of the plain engine for every family, and nothing left to compile once it is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toka_engine.errors import ConfigError
from toka_engine.model.cpu import backend
from toka_engine.model.torch_compile import compiled_model
from toka_engine.model.torch_compile.compiled_model import CompiledModel
from toka_engine.model.torch_compile.inductor_cache import CACHE_VARIABLE, choose_compile_cache
from toka_engine.slot_parameters import SlotBatch
from tokenizers import Tokenizer
from torch._dynamo import mark_dynamic
from torch._dynamo.callback import callback_handler

from tests.marks import rest_is_slow
from tests.model.driving import Driver, ints, load
from tests.model.test_logits import IDS, VARIANTS, check_parity, decode_logits, prefill_logits, reference_logits

COMPILED = {"torch_compile": True}
FIRST_OF_FAMILY = {family: name for name, (family, _) in reversed(VARIANTS.items())}
BIASES = "both biases"


@pytest.fixture(scope="module", autouse=True)
def _keep_what_is_compiled() -> Iterator[None]:
    """The C++ compiler takes a minute for all of it, so it is kept where an engine keeps its own, from run to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(CACHE_VARIABLE, raising=False)  # inductor has set it when it was imported
        choose_compile_cache()
        yield


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """torch keeps what it compiles by the function's code, which all these models share; an engine has one model."""
    yield
    torch.compiler.reset()


def regions_of(driver: Driver, num_graphs: int = 1) -> int:
    """The settings of a model that is really compiled."""
    model = driver.worker.runner.model
    assert isinstance(model, CompiledModel)
    assert model.regions.num_graphs == num_graphs
    return model.regions.num_regions


@pytest.mark.parametrize("name", [*FIRST_OF_FAMILY.values(), BIASES])
def test_a_compiled_model_of_every_family_gives_the_reference_logits(
    name: str, drive_tiny: Callable[..., tuple[Any, Driver]]
) -> None:
    family, overrides = VARIANTS[name]
    model, driver = drive_tiny(family, COMPILED, **overrides)
    assert regions_of(driver) >= 3
    check_parity(model, driver)


def test_a_compiled_model_in_bfloat16_is_as_close_to_fp32_as_transformers_bfloat16(
    drive_tiny: Callable[..., tuple[Any, Driver]],
) -> None:
    model, driver = drive_tiny(settings={**COMPILED, "dtype": "bfloat16"})
    exact = reference_logits(model, IDS[:60], 40)
    theirs = reference_logits(model.bfloat16(), IDS[:60], 40).float()
    ours = torch.cat((prefill_logits(driver, IDS, list(range(1, 41))), decode_logits(driver, IDS[:60], 40)))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.slow
def test_compiled_smollm2_gives_the_greedy_text_of_the_plain_one(smollm2: Path, smollm2_fp32: Driver) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    texts = ("The capital of France is", "def fibonacci(n):", "1, 1, 2, 3, 5, 8,", "Water boils at")
    prompts = [tokenizer.encode(text).ids for text in texts]
    plain = smollm2_fp32.generate(prompts, 32)
    compiled = Driver(load(smollm2, **COMPILED))
    assert compiled.generate(prompts, 32) == plain
    compiled.reset()
    assert compiled.generate(prompts[1:2], 32) == plain[1:2]


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows with everything that torch compiles."""
    seen: list[str] = []

    def note(arguments: Any) -> None:
        seen.append(str(arguments))

    callback_handler.register_start_callback(note)
    yield seen
    callback_handler.remove_start_callback(note)


def serve_all_shapes(driver: Driver) -> None:
    """Steps of no row, one, two and many: chunks, decode, both mixed, choices that share logits, a shared prefix."""
    size, slots = driver.page_size, list(range(40))
    driver.reset()
    driver.run()
    driver.prefill({0: IDS[:1]}, **driver.add_slots(slots))
    driver.decode([0])
    driver.prefill({1: IDS[:2]}, new=SlotBatch())
    driver.prefill({2: IDS[:60], 3: IDS[:1], 4: IDS[:67]}, new=SlotBatch())
    driver.prefill({5: IDS[:16]}, fanout={5: [5, 6, 7]}, new=SlotBatch())
    driver.prefill({8: IDS[:20]}, fanout={}, new=SlotBatch())
    driver.prefill({8: IDS[20:24]}, new=SlotBatch())
    for slot in slots[9:]:
        driver.prefill({slot: IDS[:1]}, new=SlotBatch())
    for rows in (1, 2, 3, 7, 8, 9, 16, 31, 33):
        driver.decode(slots[-rows:])
    pages = driver.grow({30: driver.lengths[30] + 5, **{slot: driver.lengths[slot] + 1 for slot in slots[9:12]}})
    driver.run(
        **pages,
        decode_slots=ints(*slots[9:12]),
        prefill_slots=ints(30),
        prefill_starts=ints(driver.lengths[30]),
        prefill_lengths=ints(5),
        prefill_tokens=ints(*IDS[:5]),
        fanout_slots=ints(30),
        fanout_chunks=ints(0),
    )
    shared = driver.pages[2][:2]
    prefixed = {slot: driver.share_pages(slot, shared, 2 * size) for slot in slots[34:38]}
    names = ("append_slots", "append_indices", "append_pages")
    fields = {name: np.concatenate([each[name] for each in prefixed.values()]) for name in names}
    driver.run(**driver.add_slots(list(prefixed), 2 * size), **fields)
    groups = {"first_rows": 0, "num_rows": 4, "first_columns": 0, "num_columns": 2}
    driver.decode(list(prefixed), **{f"group_{name}": ints(value) for name, value in groups.items()})


def test_nothing_compiles_after_the_warm_up_whatever_the_shape_of_a_step(
    drive_tiny: Callable[..., tuple[Any, Driver]], compilations: list[str]
) -> None:
    _, driver = drive_tiny("Qwen3", COMPILED, head_dim=32)
    driver.worker.warm_up()
    before_ready = list(compilations)
    assert before_ready
    serve_all_shapes(driver)
    assert compilations == before_ready


def test_layers_are_compiled_once_however_many_there_are(drive_tiny: Callable[..., tuple[Any, Driver]]) -> None:
    few = regions_of(drive_tiny(settings=COMPILED, num_hidden_layers=3)[1])
    torch.compiler.reset()
    assert regions_of(drive_tiny(settings=COMPILED, num_hidden_layers=7)[1]) == few


def test_a_row_of_a_compiled_model_has_the_same_bits_alone_and_among_others(
    drive_tiny: Callable[..., tuple[Any, Driver]],
) -> None:
    _, driver = drive_tiny(settings={**COMPILED, "dtype": "bfloat16"}, hidden_size=96, num_attention_heads=6)
    prompts = [IDS[begin : begin + 9] for begin in range(20)]
    driver.generate(prompts, 6)
    crowd = driver.logits
    driver.reset()
    driver.generate(prompts[7:8], 6)
    assert torch.equal(driver.logits[0], crowd[7])


@pytest.mark.parametrize("name", rest_is_slow([BIASES], [BIASES, FIRST_OF_FAMILY["Qwen3"]]))
def test_what_is_compiled_on_a_gpu_gives_the_reference_logits_on_a_cpu_and_compiles_nothing_later(
    name: str,
    drive_tiny: Callable[..., tuple[Any, Driver]],
    monkeypatch: pytest.MonkeyPatch,
    compilations: list[str],
) -> None:
    def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: F.linear(x, weight, bias)

    def mark_rows(ids: torch.Tensor, max_rows: int) -> None:
        if ids.shape[0] > 1:
            mark_dynamic(ids, 0, min=2, max=max_rows)

    like_cuda = replace(
        backend.make_ops(),
        make_linear=make_linear,
        make_head=lambda weight: make_linear(weight, None),
    )
    monkeypatch.setattr(backend.CpuBackend, "has_packed_linears", False)
    monkeypatch.setattr(backend, "make_ops", lambda: like_cuda)
    monkeypatch.setattr(compiled_model, "_mark_rows", mark_rows)
    family, overrides = VARIANTS[name]
    model, driver = drive_tiny(family, COMPILED, num_hidden_layers=4, **overrides)
    before_ready = list(compilations)
    check_parity(model, driver)
    serve_all_shapes(driver)
    assert compilations == before_ready
    # To the first attention, between two, from the last on; for many rows and for one.
    assert regions_of(driver, num_graphs=2) == 6


def test_a_mode_that_has_no_effect_on_a_cpu_is_refused_by_name(make_tiny: Callable[..., tuple[Any, Path]]) -> None:
    with pytest.raises(ConfigError, match="torch_compile_config=max-autotune-no-cudagraphs has no effect on a CPU"):
        load(make_tiny()[1], torch_compile_config="max-autotune-no-cudagraphs", **COMPILED)


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(
    make_tiny: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks_for_values(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * (up if float(up.sum()) > 0 else -up)

    monkeypatch.setattr("toka_engine.model.torch_compile.backend._silu_mul", asks_for_values)
    with pytest.raises(ConfigError, match="torch_compile=T: the layers cannot be compiled: ") as refusal:
        load(make_tiny()[1], **COMPILED)
    assert "\n" not in str(refusal.value)
