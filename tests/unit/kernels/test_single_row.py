"""The kernels for a step of one row give what norm, product, activation and sum give, at any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import ConfigFields, parse_model_config
from toka_engine.model.registry import build_model

BF16 = torch.bfloat16
DTYPES = [(torch.float32, 1e-5), (BF16, 1e-2)]
"""With the relative error allowed; the interpreter truncates to bf16 where a GPU rounds."""
SIZES = [(96, 24), (100, 37), (576, 31), (1100, 6), (2049, 3)]
"""(width, outputs): within the blocks and beyond, by one value too, and a last program that has outputs too many."""
EPS = 1e-5


@pytest.fixture
def kernels(device):
    from toka_engine.model.kernels.single_row import SingleRowKernels

    capability = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    return SingleRowKernels.for_capability(capability)


@pytest.fixture
def draw(device, generator):
    """draw(dtype, ..., rows, columns): random numbers with NaN all around, so that no value beyond may be used."""

    def make(dtype, *shape):
        around = torch.full((torch.Size(shape).numel() + 8192,), float("nan"), device=device, dtype=dtype)
        inner = around[4096:-4096].view(shape)
        return inner.copy_(torch.randn(*shape, generator=generator, device=device))

    return make


def relative_error(out, reference):
    return float((out.double() - reference).norm() / reference.norm())


def norm_of(x, weight):
    return F.rms_norm(x.double(), weight.shape, weight.double(), EPS)


def product_of(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("width", "num_out"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_product_is_of_the_norm(kernels, draw, dtype, tolerance, width, num_out, has_bias) -> None:
    residual, norm, weight = draw(dtype, 1, width), draw(dtype, width), draw(dtype, num_out, width)
    bias = draw(dtype, num_out) if has_bias else None
    before = residual.clone()
    out = kernels.product(residual, norm, EPS, weight, bias)
    assert out.shape == (1, num_out)
    assert out.dtype == dtype
    assert relative_error(out, product_of(norm_of(residual, norm), weight, bias)) < tolerance
    assert torch.equal(residual, before)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("width", "num_out"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_gated_product_has_the_gate_in_the_first_half(
    kernels, draw, dtype, tolerance, width, num_out, has_bias
) -> None:
    residual, norm, weight = draw(dtype, 1, width), draw(dtype, width), draw(dtype, 2 * num_out, width)
    weight /= 8
    bias = draw(dtype, 2 * num_out) if has_bias else None
    gate, up = product_of(norm_of(residual, norm), weight, bias).chunk(2, dim=1)
    out = kernels.gated_product(residual, norm, EPS, weight, bias)
    assert out.shape == (1, num_out)
    assert relative_error(out, F.silu(gate) * up) < tolerance


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("width", "num_out"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_product_is_added_once_and_to_its_row_alone(
    kernels, draw, dtype, tolerance, width, num_out, has_bias
) -> None:
    rows, weight = draw(dtype, 3, num_out), draw(dtype, num_out, width)
    packed = draw(dtype, 1, width + 48)
    x = packed[:, 32 : 32 + width]  # as the heads of q lie beside those of k and v
    bias = draw(dtype, num_out) if has_bias else None
    before = rows.clone()
    kernels.add_product(x, weight, bias, rows[1:2])
    assert relative_error(rows[1:2], before[1:2].double() + product_of(x, weight, bias)) < tolerance
    assert torch.equal(rows[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(("width", "num_out"), [(100, 37), (1100, 6)])
@pytest.mark.parametrize("loads", [{"repeats_x": True}, {"tiles_ahead": 2}, {"repeats_x": True, "tiles_ahead": 2}])
def test_other_loads_give_the_same(kernels, draw, loads, width, num_out) -> None:
    from toka_engine.model.kernels.single_row import Cut

    cut = Cut(16, 128, 4)  # nine tiles, and one alone
    usual = replace(kernels, behind_norm=cut, onto_residual=cut)
    x, norm, weight = draw(BF16, 1, width), draw(BF16, width), draw(BF16, 2 * num_out, width)
    sums = []
    for each in (usual, replace(usual, **loads)):
        sums.append(torch.zeros(1, 2 * num_out, dtype=BF16, device=x.device))
        each.add_product(x, weight, None, sums[-1])
        sums.append(each.product(x, norm, EPS, weight, None))
        sums.append(each.gated_product(x, norm, EPS, weight, None))
    for expected, found in zip(sums[:3], sums[3:], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adds", [False, True])
def test_bias_and_residual_are_added_before_the_one_rounding(kernels, draw, adds) -> None:
    x, norm, weight = draw(BF16, 1, 320), draw(BF16, 320), draw(BF16, 64, 320)
    product = product_of(x if adds else norm_of(x, norm), weight, None)
    rounded = product.to(BF16)  # what is left when it is taken away is the product's rounding error
    if adds:
        residual = -rounded
        kernels.add_product(x, weight, None, residual)
        out = residual
    else:
        out = kernels.product(x, norm, EPS, weight, -rounded[0])
    assert relative_error(out, product - rounded.double()) < 1e-2


class FirstTokens:
    """An attention backend for rows that are each the first token of a sequence: it sees itself alone, which is v."""

    def forward(self, layer, q, k, v, cos_sin):
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


class RandomWeights(Weights):
    """Tensors of any name and shape, the same for the same name."""

    def __init__(self, device):
        super().__init__(Path(), device, torch.float32, 0)

    def take(self, name, shape):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return (torch.randn(shape, generator=generator) * 0.3).to(self.device)


FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 50,
    "max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
    ],
)
def test_a_token_alone_gets_the_hidden_state_that_it_gets_among_others(device, kernels, architecture, fields) -> None:
    from toka_engine.model.kernels.single_row import Cut
    from toka_engine.model.kernels.table import make_ops

    few_programs = Cut(32, 64, 4)  # each takes the interpreter some milliseconds
    kernels = replace(kernels, behind_norm=few_programs, onto_residual=few_programs)
    config = parse_model_config(ConfigFields({"architectures": [architecture], **FIELDS, **fields}, Path()))
    ops = replace(make_ops(0), single_row=kernels)
    model = build_model(config, RandomWeights(device), ops)
    ids = torch.tensor([3, 30, 44], dtype=torch.int32, device=device)
    together = model.forward(ids, FirstTokens())
    alone = torch.cat([model.forward(ids[row : row + 1], FirstTokens()) for row in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    assert not torch.equal(alone, together)  # two ways lead there
