"""Checkpoints whose weights are 8-bit floats give the logits of the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from toka_engine.model import quantization
from toka_engine.model.quantization import StoredWeight
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.driving import Driver, load
from tests.model.test_loader import edit_config, edit_weights, refuse
from tests.model.thread_ranks import run_ranks

MakeTiny = Callable[..., tuple[Any, Path]]
Strategy = Literal["tensor", "channel", "block"]
IDS = list(range(3, 40))
BLOCK = (48, 32)
"""No multiple of a layer's size, so that the last blocks are smaller."""


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def find_scale(weight: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    """Return scales [1], [out, 1] or [blocks, blocks], by which the largest value becomes e4m3's largest."""
    if strategy == "tensor":
        return weight.abs().max().reshape(1) / 448
    if strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / 448
    rows = [part.abs().amax(0) for part in weight.split(BLOCK[0])]
    return torch.stack([torch.stack([part.max() for part in row.split(BLOCK[1])]) for row in rows]) / 448


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the scale of each value of a weight."""
    if scale.shape in ((1,), (shape[0], 1)):
        return scale.expand(shape)
    large = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return large[: shape[0], : shape[1]]


def quantise(
    model: Any, folder: Path, strategy: Strategy, suffix: str, chosen: Callable[[str], bool] = is_linear
) -> dict[str, torch.Tensor]:
    """Store the chosen weights as 8-bit floats, and give the model the values that these stand for."""
    values: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if chosen(name)]:
            weight = tensors[name]
            scale = find_scale(weight, strategy)
            tensors[name] = (weight / spread(scale, weight.shape)).to(torch.float8_e4m3fn)
            tensors[name + suffix] = scale
            values[name] = tensors[name].float() * spread(scale, weight.shape)

    edit_weights(folder, change)
    model.load_state_dict(values, strict=False)
    return values


def compressed(strategy: Strategy, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    if strategy == "block":
        weights["block_structure"] = list(BLOCK)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        **more,
    }


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
SCHEMES: list[tuple[dict[str, Any], Strategy, str]] = [
    (BLOCKS, "block", "_scale_inv"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", "_scale"),
    ({"quant_method": "fbgemm_fp8"}, "channel", "_scale"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "tensor", "_scale"),
    *((compressed(strategy), strategy, "_scale") for strategy in ("tensor", "channel", "block")),
]


def logits_of(folder: Path, **settings: Any) -> torch.Tensor:
    driver = Driver(load(folder, **settings))
    driver.prefill({0: IDS})
    return driver.logits


def expected_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[:, -1]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(("scheme", "strategy", "suffix"), SCHEMES)
def test_the_logits_are_those_of_the_values_that_the_weights_stand_for(
    make_tiny: MakeTiny, family: str, scheme: dict[str, Any], strategy: Strategy, suffix: str
) -> None:
    model, folder = make_tiny(family)
    plain = expected_logits(model)
    quantise(model, folder, strategy, suffix)
    edit_config(folder, quantization_config=scheme)
    expected = expected_logits(model)
    torch.testing.assert_close(logits_of(folder), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2, "the weights have not been rounded"


def test_transformers_reads_the_same_from_a_folder_of_blocks(make_tiny: MakeTiny) -> None:
    import transformers

    model, folder = make_tiny(hidden_size=192, intermediate_size=288)  # it takes whole blocks alone
    quantise(model, folder, "block", "_scale_inv")
    edit_config(folder, quantization_config=BLOCKS)
    wanted = transformers.FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.float32)
    torch.testing.assert_close(logits_of(folder), expected_logits(theirs), rtol=1e-4, atol=1e-4)


def test_layers_that_were_left_as_they_are_keep_their_values(make_tiny: MakeTiny) -> None:
    model, folder = make_tiny()
    quantise(model, folder, "channel", "_scale", lambda name: is_linear(name) and "layers.0" in name)
    edit_config(folder, quantization_config=compressed("channel", ignore=["lm_head", "re:.*layers.1.*"]))
    torch.testing.assert_close(logits_of(folder), expected_logits(model), rtol=1e-4, atol=1e-4)


def test_a_quantised_head_and_embedding_are_read_too(make_tiny: MakeTiny) -> None:
    model, folder = make_tiny()
    quantise(model, folder, "channel", "_scale", lambda name: "lm_head" in name or "embed" in name)
    edit_config(folder, quantization_config=compressed("channel"))
    torch.testing.assert_close(logits_of(folder), expected_logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "strategy", "suffix"), SCHEMES[:3])
def test_ranks_scale_the_parts_that_they_hold(
    make_tiny: MakeTiny, scheme: dict[str, Any], strategy: Strategy, suffix: str
) -> None:
    model, folder = make_tiny()
    quantise(model, folder, strategy, suffix)
    edit_config(folder, quantization_config=scheme)

    def first_token(ranks: Any) -> torch.Tensor:
        driver = Driver(load(folder, ranks))
        driver.prefill({0: IDS})
        return driver.logits

    parts = run_ranks(2, first_token)
    torch.testing.assert_close(torch.cat(parts, 1), expected_logits(model), rtol=1e-4, atol=1e-4)


class LargestFloat32(TorchDispatchMode):
    """Notes the largest tensor of fp32 that is made."""

    num_values = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.num_values = max(self.num_values, made.numel())
        return made


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_a_large_weight_is_never_whole_in_fp32(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_PIECE_VALUES", 1000)
    weight = torch.randn(100, 70)
    scale = find_scale(weight, strategy)
    stored = (weight / spread(scale, weight.shape)).to(torch.float8_e4m3fn)
    with LargestFloat32() as largest:
        values = StoredWeight("scale", (100, 70), scale, BLOCK).dequantise(stored, None, torch.bfloat16)
    assert torch.equal(values, (stored.float() * spread(scale, weight.shape)).bfloat16())
    assert largest.num_values <= 1000


# ---------------------------------------------------------------- what is refused

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def channels(make_tiny: MakeTiny) -> Path:
    """A folder with a scale for each output channel."""
    model, folder = make_tiny()
    quantise(model, folder, "channel", "_scale")
    edit_config(folder, quantization_config=compressed("channel"))
    return folder


def edit_scale(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit_weights(folder, lambda tensors: tensors.update({f"{WEIGHT}_scale": change(tensors[f"{WEIGHT}_scale"])}))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_and_finite_is_named(channels: Path, value: float) -> None:
    edit_scale(channels, lambda scale: scale.index_fill(0, torch.tensor([3]), value))
    refuse(channels, f"{WEIGHT}_scale", "positive")


def test_a_misshapen_scale_is_named_with_the_shapes_that_it_may_have(channels: Path) -> None:
    edit_scale(channels, lambda scale: torch.ones(7, 1))
    refuse(channels, f"{WEIGHT}_scale", "[7, 1]", "[160, 64]", "[160, 1]")


def test_a_missing_scale_is_named(channels: Path) -> None:
    edit_weights(channels, lambda tensors: tensors.pop(f"{WEIGHT}_scale"))
    refuse(channels, f"{WEIGHT}_scale")


def test_8_bit_floats_without_a_scheme_are_refused(channels: Path) -> None:
    edit_config(channels, quantization_config=None)
    refuse(channels, "_proj.weight", "float8_e4m3fn", "quantization_config")


def test_another_8_bit_float_is_refused(channels: Path) -> None:
    edit_weights(channels, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].float().to(torch.float8_e5m2)}))
    refuse(channels, WEIGHT, "float8_e5m2")


BAD_SCHEMES: list[tuple[Any, str]] = [
    (5, "quantization_config"),
    ({}, "quant_method"),
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({**BLOCKS, "fmt": "e5m2"}, "e5m2"),
    *(({**BLOCKS, "weight_block_size": size}, "weight_block_size") for size in (128, [128], [0, 128], [1.5, 2], "x")),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    ({"quant_method": "compressed-tensors"}, "config_groups"),
    ({**compressed("tensor"), "config_groups": {}}, "config_groups"),
    ({**compressed("tensor"), "config_groups": {"group_0": {"targets": ["Linear"]}}}, "weights"),
    ({**compressed("tensor"), "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}, "4 bits"),
    ({**compressed("tensor"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (compressed("group"), "group"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("scheme", "word"), BAD_SCHEMES)
def test_a_scheme_that_is_not_understood_is_refused_by_name(make_tiny: MakeTiny, scheme: Any, word: str) -> None:
    folder = make_tiny()[1]
    edit_config(folder, quantization_config=scheme)
    refuse(folder, "config.json: quantization_config", word)


def test_scales_that_have_no_use_are_told_once_for_all_layers(
    make_tiny: MakeTiny, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = make_tiny()
    quantise(model, folder, "tensor", "_scale")
    edit_config(folder, quantization_config=compressed("tensor"))

    def add_scales(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.ones(1)
            tensors[f"model.layers.{layer}.mlp.up_proj.input_scale"] = torch.ones(1)

    edit_weights(folder, add_scales)
    with caplog.at_level("WARNING", "toka.model"):
        load(folder)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "event=unused_tensor name=model.layers.*.self_attn.k_scale count=2",
        "event=dequantised weights=14 stored=float8_e4m3fn computed=float32",
    ]
