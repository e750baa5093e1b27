"""The kernels for a step of one row give what norm, product, activation and sum give, at any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toka_engine.model.architectures.registry import build_model
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.loader import Weights
from toka_engine.model.model_config import parse_model_config
from toka_engine.model.ranks import SingleRank

from tests.marks import rest_is_slow

BF16 = torch.bfloat16
DTYPES = [(torch.float32, 1e-5), (BF16, 1e-2)]
"""The relative error allowed, by dtype; the interpreter truncates to bf16 where a GPU rounds."""
SIZES = [
    (0, 100, 37, False),
    (1, 0, 1, True),
    (1, 64, 31, True),
    (2, 0, 16, False),
    (2, 1, 3, True),
    (3, 0, 5, False),
    (4, 24, 6, True),
]
"""(tiles of the cut, more values, outputs, whether there is a bias): a turn of the kernel has two tiles, and a row may
end within either of them or behind it; the last program may have outputs too many."""
EPS = 1e-5


@pytest.fixture
def kernels(device):
    from toka_engine.model.kernels.gemv import TritonGemv

    capability = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    return TritonGemv.for_capability(capability)


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


@pytest.mark.parametrize(("tiles", "more", "num_out", "has_bias"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_product_is_of_the_norm(kernels, draw, dtype, tolerance, tiles, more, num_out, has_bias) -> None:
    width = tiles * kernels.behind_norm.block_in + more
    residual, norm, weight = draw(dtype, 1, width), draw(dtype, width), draw(dtype, num_out, width)
    bias = draw(dtype, num_out) if has_bias else None
    before = residual.clone()
    out = kernels.norm_gemv(residual, norm, EPS, weight, bias)
    assert out.shape == (1, num_out)
    assert out.dtype == dtype
    assert relative_error(out, product_of(norm_of(residual, norm), weight, bias)) < tolerance
    assert torch.equal(residual, before)


@pytest.mark.parametrize(("tiles", "more", "num_out", "has_bias"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_gated_product_has_the_gate_in_the_first_half(
    kernels, draw, dtype, tolerance, tiles, more, num_out, has_bias
) -> None:
    width = tiles * kernels.behind_norm.block_in + more
    residual, norm, weight = draw(dtype, 1, width), draw(dtype, width), draw(dtype, 2 * num_out, width)
    weight /= 8
    bias = draw(dtype, 2 * num_out) if has_bias else None
    gate, up = product_of(norm_of(residual, norm), weight, bias).chunk(2, dim=1)
    out = kernels.norm_gated_gemv(residual, norm, EPS, weight, bias)
    assert out.shape == (1, num_out)
    assert relative_error(out, F.silu(gate) * up) < tolerance


@pytest.mark.parametrize(("tiles", "more", "num_out", "has_bias"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_product_is_added_once_and_to_its_row_alone(
    kernels, draw, dtype, tolerance, tiles, more, num_out, has_bias
) -> None:
    width = tiles * kernels.other.block_in + more
    rows, weight, x = draw(dtype, 3, num_out), draw(dtype, num_out, width), draw_beside_others(draw, dtype, width)
    bias = draw(dtype, num_out) if has_bias else None
    before = rows.clone()
    kernels.gemv_add(x, weight, bias, rows[1:2])
    assert relative_error(rows[1:2], before[1:2].double() + product_of(x, weight, bias)) < tolerance
    assert torch.equal(rows[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(("tiles", "more", "num_out"), [size[:3] for size in SIZES])
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
def test_the_heads_product_is_of_the_row_alone_and_not_rounded(kernels, draw, dtype, tiles, more, num_out) -> None:
    width = tiles * kernels.other.block_in + more
    x, weight = draw_beside_others(draw, dtype, width), draw(dtype, num_out, width)
    before = x.clone()
    out = kernels.head_gemv(x, weight)
    assert out.shape == (1, num_out)
    assert out.dtype == torch.float32
    assert relative_error(out, product_of(x, weight, None)) < 1e-5
    assert torch.equal(x, before)


def draw_beside_others(draw, dtype, width):
    """[1, width] within a longer row, as the heads of q lie beside those of k and v."""
    return draw(dtype, 1, width + 48)[:, 32 : 32 + width]


@pytest.mark.parametrize("adds", [False, True])
def test_bias_and_residual_are_added_before_the_one_rounding(kernels, draw, adds) -> None:
    x, norm, weight = draw(BF16, 1, 320), draw(BF16, 320), draw(BF16, 64, 320)
    product = product_of(x if adds else norm_of(x, norm), weight, None)
    rounded = product.to(BF16)  # what is left when it is taken away is the product's rounding error
    if adds:
        residual = -rounded
        kernels.gemv_add(x, weight, None, residual)
        out = residual
    else:
        out = kernels.norm_gemv(x, norm, EPS, weight, -rounded[0])
    assert relative_error(out, product - rounded.double()) < 1e-2


class FirstTokens:
    """An attention backend for rows that are each the first token of a sequence: it sees itself alone, which is v."""

    def forward(self, layer, q, k, v, cos_sin):
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


class RandomWeights(Weights):
    """Tensors of any name and shape, the same for the same name."""

    def __init__(self, device):
        super().__init__(Path(), device, torch.float32, 0)

    def take(self, name, shape, shard=None):
        assert shard is None or shard.cut(shape) == shape, "there is one rank"
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
    rest_is_slow(
        [("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}), ("Qwen3ForCausalLM", {})],
        [
            ("LlamaForCausalLM", {}),
            ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
            ("Qwen2ForCausalLM", {}),
            ("Qwen3ForCausalLM", {}),
        ],
    ),
)
def test_a_token_alone_gets_the_hidden_state_and_the_logits_that_it_gets_among_others(
    device, kernels, architecture, fields
) -> None:
    from toka_engine.model.cuda.backend import make_linear, make_ops
    from toka_engine.model.kernels.gemv import LaunchConfig

    few_programs = LaunchConfig(32, 64, 4)  # each takes the interpreter some milliseconds
    kernels = replace(kernels, behind_norm=few_programs, other=few_programs)
    config = parse_model_config(ConfigFields({"architectures": [architecture], **FIELDS, **fields}, Path()))
    # torch's product with another dtype is for GPUs alone
    ops = replace(make_ops(0), gemv=kernels, make_head=lambda weight: make_linear(weight, None))
    model = build_model(config, RandomWeights(device), ops, SingleRank())
    ids = torch.tensor([3, 30, 44], dtype=torch.int32, device=device)
    together = model.forward(ids, FirstTokens())
    alone = torch.cat([model.forward(ids[row : row + 1], FirstTokens()) for row in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    assert not torch.equal(alone, together)  # two ways lead there
    logits = model.logits(together)
    logits_alone = torch.cat([model.logits(together[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(logits_alone, logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(logits_alone, logits)
