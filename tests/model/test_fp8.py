"""A device that computes in fp8 gets the 8-bit floats of a checkpoint, or those that its weights are rounded to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toka_engine.errors import OutOfMemoryError
from toka_engine.model.cpu import backend
from toka_engine.model.loader import Weights
from toka_engine.slot_parameters import SlotBatch

from tests.model.driving import Driver, load
from tests.model.plain_fp8 import PlainFp8
from tests.model.test_loader import edit_config, edit_weights, refuse
from tests.model.test_quantised_checkpoints import IDS, SCHEMES, Strategy, compressed, is_linear, quantise, spread
from tests.model.test_single_row import PlainGemv
from tests.model.thread_ranks import run_ranks

MakeTiny = Callable[..., tuple[Any, Path]]
FUSED = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
STEP = 2.0**-4
"""The largest relative error of a value that is rounded to e4m3's three bits of mantissa."""

NEAR = 0.15
"""More than the KL divergence of a tiny model's rounded logits, whose sums have 64 terms."""


@pytest.fixture
def fp8(monkeypatch: pytest.MonkeyPatch) -> PlainFp8:
    """A CPU that computes in fp8, for this test."""
    plain, make_ops = PlainFp8(), backend.make_ops
    monkeypatch.setattr(backend, "make_ops", lambda: replace(make_ops(), fp8=plain.make_ops()))
    return plain


def drive(folder: Path, *ranks: Any, **settings: Any) -> Driver:
    return Driver(load(folder, *ranks, **{"dtype": "bfloat16", **settings}))


def logits_of(driver: Driver) -> torch.Tensor:
    driver.prefill({0: IDS})
    return driver.logits


def divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    ours, theirs = torch.log_softmax(found, -1), torch.log_softmax(expected, -1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def find_fused(folder: Path, strategy: Strategy, suffix: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the stored values of each GEMM's weights, in the order of the layers, and each value's scale."""
    tensors = load_file(folder / "model.safetensors")
    found = []
    for layer in range(2):
        for names in FUSED:
            whole = [name for part in names for name in tensors if f".{layer}." in name and f"{part}.weight" in name]
            weights = [tensors[name] for name in whole if not name.endswith(suffix)]
            scales = [tensors[name] for name in whole if name.endswith(suffix)]
            large = [spread(scale, weight.shape) for scale, weight in zip(scales, weights, strict=True)]
            found.append((torch.cat([weight.float() for weight in weights]), torch.cat(large)))
    return found


@pytest.mark.parametrize(("scheme", "strategy", "suffix"), SCHEMES)
def test_stored_values_are_kept_and_those_of_blocks_rounded_once_more(
    make_tiny: MakeTiny, fp8: PlainFp8, scheme: dict[str, Any], strategy: Strategy, suffix: str
) -> None:
    model, folder = make_tiny()
    quantise(model, folder, strategy, suffix)
    edit_config(folder, quantization_config=scheme)
    logits = logits_of(drive(folder))
    expected = find_fused(folder, strategy, suffix)
    for (weight, scale), (stored, stored_scale) in zip(fp8.weights, expected, strict=True):
        if strategy == "block":
            exact = stored * stored_scale
            error = (weight.float() * scale[:, None] - exact).abs()
            assert bool((error <= STEP * exact.abs() + 2.0**-10 * scale[:, None] * 1.001).all())
            assert torch.equal(weight.float().abs().amax(1), torch.full(scale.shape, 448.0))
        else:
            assert torch.equal(weight.float(), stored)
            assert torch.equal(scale[:, None].expand(stored.shape), stored_scale)
    plain = logits_of(drive(folder, quantization="none"))
    assert 0 < divergence(logits, plain) < NEAR


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_weights_that_are_rounded_at_load_give_nearly_the_same(make_tiny: MakeTiny, fp8: PlainFp8, family: str) -> None:
    folder = make_tiny(family)[1]
    logits = logits_of(drive(folder, quantization="fp8"))
    assert len(fp8.weights) == 8
    for weight, scale in fp8.weights:
        assert torch.equal(weight.float().abs().amax(1), torch.full(scale.shape, 448.0))
    assert 0 < divergence(logits, logits_of(drive(folder, quantization="none"))) < NEAR
    assert len(fp8.weights) == 8, "none means none"


def test_norms_and_activations_are_quantised_where_they_are_computed(make_tiny: MakeTiny, fp8: PlainFp8) -> None:
    driver = drive(make_tiny()[1], quantization="fp8")
    driver.prefill({0: IDS, 1: IDS})
    first = ["norm", "gemm", "quantise", "gemm", "add_norm", "gemm", "silu_mul", "gemm"]
    assert fp8.calls == [*first, "add_norm", *first[1:]]


def test_a_step_of_one_row_reads_the_same_weights_with_the_row_as_it_is(
    make_tiny: MakeTiny, fp8: PlainFp8, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny()[1]
    expected = logits_of(drive(folder, quantization="fp8"))
    make_ops = backend.make_ops
    monkeypatch.setattr(backend, "make_ops", lambda: replace(make_ops(), gemv=PlainGemv()))
    driver = drive(folder, quantization="fp8")
    driver.prefill({0: IDS[:-1]})
    fp8.calls.clear()
    driver.prefill({0: IDS[-1:]}, new=SlotBatch())
    assert fp8.calls == ["gemv"] * 8
    assert divergence(driver.logits, expected) < NEAR


@pytest.mark.parametrize(("scheme", "strategy", "suffix"), [(None, "", ""), *SCHEMES[:3]])
def test_ranks_hold_their_parts_with_the_scales_of_these(
    make_tiny: MakeTiny, fp8: PlainFp8, scheme: dict[str, Any] | None, strategy: Any, suffix: str
) -> None:
    model, folder = make_tiny()
    if scheme is not None:
        quantise(model, folder, strategy, suffix)
        edit_config(folder, quantization_config=scheme)
    settings = {"quantization": "fp8" if scheme is None else "auto"}
    expected = logits_of(drive(folder, **settings))
    whole = list(fp8.weights)
    fp8.weights.clear()
    parts = run_ranks(2, lambda ranks: logits_of(drive(folder, ranks, **settings)))
    assert divergence(torch.cat(parts, 1), expected) < NEAR
    assert sum(weight.numel() for weight, _ in fp8.weights) == sum(weight.numel() for weight, _ in whole)
    if strategy in ("tensor", "channel"):  # a part of the inputs has the scales of all outputs
        (_, scale), *_ = [each for each in whole if each[0].shape == (64, 160)]
        found = [part for weight, part in fp8.weights if weight.shape == (64, 80)]
        assert sum(torch.equal(part, scale) for part in found) == 2


@pytest.mark.parametrize(
    ("left", "num_quantised"), [("layers.1", 4), ("layers.1.self_attn.k_proj", 7), ("layers.1.mlp.up_proj", 7)]
)
def test_layers_that_a_checkpoint_leaves_as_they_are_stay_so(
    make_tiny: MakeTiny, fp8: PlainFp8, left: str, num_quantised: int
) -> None:
    """A GEMM of several weights computes in bf16 where one of them is left."""
    model, folder = make_tiny()
    quantise(model, folder, "channel", "_scale", lambda name: is_linear(name) and left not in name)
    edit_config(folder, quantization_config=compressed("channel"))
    for quantization in ("auto", "fp8"):
        fp8.weights.clear()
        logits = logits_of(drive(folder, quantization=quantization))
        assert len(fp8.weights) == num_quantised
        assert 0 < divergence(logits, logits_of(drive(folder, quantization="none"))) < NEAR


def test_sizes_that_tensor_cores_do_not_multiply_stay_as_they_are(make_tiny: MakeTiny, fp8: PlainFp8) -> None:
    folder = make_tiny(intermediate_size=168)[1]
    logits = logits_of(drive(folder, quantization="fp8"))
    assert sorted({tuple(weight.shape) for weight, _ in fp8.weights}) == sorted(
        {tuple(weight.shape) for weight, _ in fp8.weights if 168 not in weight.shape}
    )
    assert len(fp8.weights) == 6  # gate and up have 336 outputs together
    assert divergence(logits, logits_of(drive(folder, quantization="none"))) < NEAR


def test_a_weight_that_is_not_finite_is_named(make_tiny: MakeTiny, fp8: PlainFp8) -> None:
    folder, name = make_tiny()[1], "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = float("inf")

    edit_weights(folder, spoil)
    refuse(folder, name, "not finite", quantization="fp8", dtype="bfloat16")


def test_a_device_without_fp8_computes_as_if_nothing_were_asked_and_says_so_once(
    make_tiny: MakeTiny, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny()[1]
    with caplog.at_level("WARNING", "toka.model"):
        logits = logits_of(drive(folder, quantization="fp8"))
        assert torch.equal(logits, logits_of(drive(folder)))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("event=no_fp8 ")
    assert "quantization=fp8" in told


def test_another_dtype_than_bfloat16_is_computed_in_itself(make_tiny: MakeTiny, fp8: PlainFp8) -> None:
    model, folder = make_tiny()
    quantise(model, folder, "channel", "_scale")
    edit_config(folder, quantization_config=compressed("channel"))
    drive(folder, dtype="float32")
    assert fp8.weights == []


def test_8_bit_floats_need_half_the_memory_and_a_shortage_says_so(make_tiny: MakeTiny) -> None:
    folder, name, shape = make_tiny()[1], "model.layers.0.mlp.up_proj.weight", (160, 64)
    cpu, num_bytes = torch.device("cpu"), 160 * 64
    with Weights(folder, cpu, torch.bfloat16, num_bytes, computes_fp8=True) as weights:
        weights.take_quantised(name, shape)
        with pytest.raises(OutOfMemoryError, match="as quantization=fp8"):
            weights.take_quantised(name, shape)
    with Weights(folder, cpu, torch.bfloat16, num_bytes) as weights, pytest.raises(OutOfMemoryError):
        weights.take(name, shape)
