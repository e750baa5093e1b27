"""Linear layers in fp8 on the GPU: the GEMM against float64, SmolLM2 against transformers in fp32.

The kernels around the GEMM are the matter of tests/unit/kernels/test_fp8_kernels.py, which runs on the GPU, too.
"""

from __future__ import annotations

import copy
import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toka_engine.model.cuda.backend import make_fp8_linear
from toka_engine.model.kernels.quantised_rows import quantise_rows
from toka_engine.model.quantization import quantise_weight

from tests.gpu.test_parity import drive, generate
from tests.gpu.test_smollm2 import folder, prompts, reference
from tests.model.driving import Driver, load
from tests.model.test_loader import edit_config
from tests.model.test_quantised_checkpoints import BLOCKS, compressed, quantise

__all__ = ["folder", "prompts", "reference"]
NUM_TOKENS = 64
NUM_SEEDED = 40


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 33, 256, 1000])
@pytest.mark.parametrize(("width", "num_out"), [(16, 48), (576, 960), (4096, 6144)])
def test_a_product_has_the_scale_of_its_row_and_of_its_output(
    rows: int, width: int, num_out: int, has_bias: bool
) -> None:
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    weight = quantise_weight(draw(num_out, width) * torch.logspace(-3, 3, num_out, device="cuda")[:, None])
    x = draw(rows, width) * torch.logspace(-2, 2, max(1, rows), device="cuda")[:rows, None]
    bias = draw(num_out).bfloat16() if has_bias else None
    values, scales = quantise_rows(x.bfloat16())
    found = make_fp8_linear(weight.values, weight.scale, bias)((values, scales))
    assert found.dtype == torch.bfloat16
    exact = weight.values.double() * weight.scale.double()[:, None]
    expected = F.linear(values.double() * scales.double(), exact, None if bias is None else bias.double())
    assert found.shape == expected.shape
    sizes = (values.double().abs() * scales.double()) @ exact.abs().t()  # of the terms of each sum
    if bias is not None:
        sizes += bias.double().abs()
    assert bool(((found.double() - expected).abs() <= 2.0**-8 * expected.abs() + 2.0**-10 * sizes).all())


@dataclass(frozen=True, slots=True)
class Distance:
    """Mean KL divergence of the next token's distribution from that of fp32, and the share of equal best tokens."""

    kl: float
    agreement: float

    @classmethod
    def of(cls, found: list[torch.Tensor], expected: list[torch.Tensor]) -> Distance:
        ours, theirs = (torch.log_softmax(torch.cat(each).double().cuda(), -1) for each in (found, expected))
        kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        return cls(float(kl), float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))

    def __str__(self) -> str:
        return f"KL {self.kl:.5f} agreement {self.agreement:.4f}"


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """Return what is left of x when each row of its last dimension is rounded to fp8."""
    rounded = quantise_weight(x.reshape(-1, x.shape[-1]))
    return (rounded.values.float() * rounded.scale[:, None]).view(x.shape)


def define_fp8(model: Any, rounds_weights: bool = True) -> Any:
    """Return `model`, in fp32, with linear layers whose inputs, and weights unless they are already, are rounded."""
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            if rounds_weights:
                layer.weight.data = round_rows(layer.weight.data)
            layer.register_forward_pre_hook(lambda _, inputs: (round_rows(inputs[0]),))
    return model


def force(model: Any, prompts: list[list[int]], outputs: torch.Tensor) -> list[torch.Tensor]:
    """The model's logits where each of the outputs' tokens was sampled."""
    with torch.inference_mode():
        sequences = [prompt + output.tolist() for prompt, output in zip(prompts, outputs, strict=True)]
        logits = [model(torch.tensor([ids], device="cuda")).logits[0] for ids in sequences]
    return [rows[len(prompt) - 1 : -1] for rows, prompt in zip(logits, prompts, strict=True)]


def check(name: str, prompts: list[list[int]], model: Any, defined: Any, drivers: tuple[Driver, Driver]) -> None:
    """Teacher-forced on our tokens: fp8 is as near to fp32 as its definition is, whose products are not rounded."""

    def run(each: Any, outputs: torch.Tensor) -> list[torch.Tensor]:
        return force(each, prompts, outputs)

    (bf16_tokens, bf16_logits), (tokens, logits) = (generate(driver, prompts, NUM_TOKENS) for driver in drivers)
    bf16 = Distance.of(list(bf16_logits), run(model, bf16_tokens))
    expected = run(model, tokens)
    fp8, definition = Distance.of(list(logits), expected), Distance.of(run(defined, tokens), expected)
    print(f"{name}: bf16 {bf16}; fp8 {fp8}; definition of fp8 {definition}")
    assert fp8.kl > 2 * bf16.kl, "it has computed in bf16"
    assert fp8.kl <= 1.3 * definition.kl + 3 * bf16.kl
    assert fp8.agreement >= definition.agreement - 0.05


@pytest.mark.parametrize("count", [1, 8])
def test_a_model_that_is_quantised_at_load_is_as_near_to_fp32_as_fp8_is(
    reference: Any, folder: Path, prompts: list[list[int]], count: int
) -> None:
    """One row rounds its weights alone: it is nearer."""
    pair = drive(folder, quantization="none"), drive(folder, quantization="fp8")
    check(f"at load, {count} rows", prompts[-count:], reference, define_fp8(reference), pair)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_a_checkpoint_in_fp8_computes_with_the_values_that_it_stores(
    folder: Path, prompts: list[list[int]], tmp_path: Path, strategy: Any
) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    quantise(model, copied, strategy, "_scale")
    edit_config(copied, quantization_config=BLOCKS if strategy == "block" else compressed(strategy))
    defined = define_fp8(model.cuda(), rounds_weights=strategy == "block")  # blocks are rounded once more
    check(strategy, prompts, model, defined, (drive(copied, quantization="none"), drive(copied)))


@pytest.mark.parametrize("count", [1, 8])
def test_a_cache_in_fp8_is_near_to_fp32(reference: Any, folder: Path, prompts: list[list[int]], count: int) -> None:
    ways = {
        "bf16": {},
        "fp8 cache": {"kv_cache_dtype": "fp8"},
        "fp8 weights": {"quantization": "fp8"},
        "both": {"kv_cache_dtype": "fp8", "quantization": "fp8"},
    }
    found = {}
    for name, settings in ways.items():
        tokens, logits = generate(drive(folder, **settings), prompts[-count:], NUM_TOKENS)
        found[name] = Distance.of(list(logits), force(reference, prompts[-count:], tokens))
    print(f"{count} rows:", *(f"{name}: {distance};" for name, distance in found.items()))
    assert found["bf16"].kl < found["fp8 cache"].kl <= 3 * found["bf16"].kl + 0.01
    assert found["both"].kl <= 1.5 * found["fp8 weights"].kl + 0.01


@pytest.fixture(scope="module", params=["quantization", "kv_cache_dtype"])
def drivers(request: pytest.FixtureRequest, folder: Path) -> list[Driver]:
    return [drive(folder, **{request.param: "fp8"}, use_cudagraphs=use) for use in (True, False)]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_graphs_change_no_token(drivers: list[Driver], prompts: list[list[int]], count: int) -> None:
    def greedy(driver: Driver) -> list[list[int]]:
        driver.reset()
        return driver.generate(prompts[:count], NUM_TOKENS)

    with_graphs, without = map(greedy, drivers)
    assert with_graphs == without
    assert greedy(drivers[0]) == with_graphs


def test_seeds_repeat(drivers: list[Driver], prompts: list[list[int]]) -> None:
    def draw(driver: Driver, first: int) -> list[list[int]]:
        driver.reset()
        return driver.generate(prompts, NUM_SEEDED, temperature=1.0, seed=list(range(first, first + len(prompts))))

    first = draw(drivers[0], 5)
    assert draw(drivers[0], 5) == first
    assert draw(drivers[1], 5) == first
    assert draw(drivers[0], 50) != first


def count_requested() -> int:
    """The bytes of all tensors, without what torch's blocks have more: for a weight of 1.2 MB that may be as much."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def test_weights_take_half_the_memory(folder: Path) -> None:
    def count_bytes(quantization: str) -> int:
        gc.collect()
        before = count_requested()
        settings = {"device": "cuda", "dtype": "bfloat16", "max_seqs_per_forward": 8, "quantization": quantization}
        worker = load(folder, **settings)
        gc.collect()  # of what loading left, and of engines that other tests had
        taken = count_requested() - before
        del worker
        return taken

    for quantization in ("none", "fp8"):
        count_bytes(quantization)  # some memory is taken once in a process
    whole, less = count_bytes("none"), count_bytes("fp8")
    num_values = 30 * (576 * 960 + 576 * 576 + 3 * 576 * 1536)  # of SmolLM2's linear layers
    assert 0.98 * num_values < whole - less <= num_values
