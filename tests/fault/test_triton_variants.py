"""An image holds those variants of our Triton kernels that engine starts ask for, and steps ask for nothing more.

Models are rehearsed, nothing is compiled: Triton says which variants it would compile. In a process of its own, since
other tests run these kernels in Triton's interpreter.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.fault.image import ROOT, run

pytestmark = pytest.mark.timeout(900)
KERNELS = ROOT / "engine/toka_engine/model/kernels"

RECORD = """
import json, random
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import torch
from toka_engine.model.aot.triton_build import FP8_CACHE, Variants, list_shapes, make_model
from toka_engine.model.aot.triton_dry_run import DryRanks, dry_run, hand_over, make_runner
from toka_engine.model.cuda.flashinfer_modules import BUILT_HEAD_DIMS
from toka_engine.model.quantization import Quantization
from toka_engine.model.sizing import Sizes
from tests.model.driving import Driver, ints

KNOWN = {
    "SmolLM2-135M": ("Llama", 576, 1536, 9, 3, 64, 49152),
    "SmolLM2-360M": ("Llama", 960, 2560, 15, 5, 64, 49152),
    "TinyLlama-1.1B": ("Llama", 2048, 5632, 32, 4, 64, 32000),
    "Llama-2-7B": ("Llama", 4096, 11008, 32, 32, 128, 32000),
    "Llama-2-13B with a token more": ("Llama", 5120, 13824, 40, 40, 128, 32001),
    "Llama-3.2-1B": ("Llama", 2048, 8192, 32, 8, 64, 128256),
    "Llama-3.2-3B": ("Llama", 3072, 8192, 24, 8, 128, 128256),
    "Llama-3.1-8B": ("Llama", 4096, 14336, 32, 8, 128, 128256),
    "Llama-3.1-8B with a token more": ("Llama", 4096, 14336, 32, 8, 128, 128257),
    "Llama-3.1-70B": ("Llama", 8192, 28672, 64, 8, 128, 128256),
    "Llama-3.1-405B": ("Llama", 16384, 53248, 128, 8, 128, 128256),
    "Qwen2.5-0.5B": ("Qwen2", 896, 4864, 14, 2, 64, 151936),
    "Qwen2.5-7B": ("Qwen2", 3584, 18944, 28, 4, 128, 152064),
    "Qwen2.5-14B": ("Qwen2", 5120, 13824, 40, 8, 128, 152064),
    "Qwen3-0.6B": ("Qwen3", 1024, 3072, 16, 8, 128, 151936),
    "Qwen3-14B": ("Qwen3", 5120, 17408, 40, 8, 128, 151936),
    "Qwen3-32B": ("Qwen3", 5120, 25600, 64, 8, 128, 151936),
}
NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
draw = random.Random(5)

def known_shape(family, *sizes):
    return make_model(family + "ForCausalLM", **dict(zip(NAMES, sizes)), max_position_embeddings=4000), 16

def any_shape():
    kv_heads = draw.randint(1, 9)
    sizes = (
        draw.choice([64, 100, 1001, 4096]), draw.randint(2, 30000), kv_heads * draw.randint(1, 9), kv_heads,
        draw.choice([64, 128, 256]), draw.choice([17, 4096, 50001, 400000]),
    )
    num_positions, page_size = draw.randint(1, 4000), draw.choice([1, 2, 7, 16])
    return make_model(**dict(zip(NAMES, sizes)), max_position_embeddings=num_positions), page_size

def launch_steps_of_every_kind(driver, num_logprobs, seed, top_p, presence):
    driver.reset()
    slots = [0, 2, 1, 3, 4]
    new = driver.add_slots(
        slots, num_logprobs=[-1, num_logprobs, -1, num_logprobs, -1], seed=[seed, -1, seed, seed, -1],
        top_p=[top_p, 1.0, 1.0, top_p, 1.0], presence_penalty=[presence, 0.0, presence, 0.0, 0.0],
        temperature=[0.5, 0.0, 1.0, 1.0, 1.0], grammar=[1, 0, 1, 0, 0],
    )
    driver.prefill({0: [5] * 33, 1: [6] * 3}, fanout={0: [0, 2, 3, 4], 1: [1]}, **new)
    for slot in (2, 3, 4):
        driver.lengths[slot], driver.pages[slot] = 33, driver.pages[0][:2]
    driver.decode(slots, copy_from=ints(2), copy_to=ints(40))
    for first_rows, num_rows, first_columns in (((0, 3), (2, 2), (0, 0)), ((0, 0), (2, 2), (0, 1)), ((), (), ())):
        driver.decode(
            slots, group_first_rows=ints(*first_rows), group_num_rows=ints(*num_rows),
            group_first_columns=ints(*first_columns), group_num_columns=ints(*map(bool, num_rows)),
        )
    driver.decode([1])
    for slot, beside in ((5, [1]), (6, [0, 2, 4]), (7, [0, 1, 2, 3])):
        new = driver.add_slots([slot], seed=seed, top_p=top_p)
        pages = driver.grow({slot: 5} | {each: driver.lengths[each] + 1 for each in beside})
        driver.run(
            **new, **pages, decode_slots=ints(*beside),
            prefill_slots=ints(slot), prefill_starts=ints(0), prefill_lengths=ints(5), prefill_tokens=ints(*[8] * 5),
            fanout_slots=ints(slot), fanout_chunks=ints(0),
        )

def launch_steps(shape):
    runner, ready = make_runner(*shape)
    runner.finish = lambda launched: launched
    runner.grammars.add(1, SimpleNamespace(deep_copy=lambda: None))
    driver = Driver(SimpleNamespace(runner=runner, ready=ready))
    for num_logprobs in (-1, 0, 3):
        for seed in (-1, 7):
            for top_p in (1.0, 0.9):
                for presence in (0.0, 0.5):
                    launch_steps_of_every_kind(driver, num_logprobs, seed, top_p, presence)
    decode_graphs = runner.make_decode_graphs()
    for size in (1, 3, 40):
        decode_graphs.launch(size)
    runner.launch_many_rows(9000)

def record(name, shapes):
    variants = Variants(90)
    variants.record(shapes)
    report(name, variants)

def report(name, variants):
    print(json.dumps([name, [
        [kernel.rpartition(".")[2], key, str(json.loads(data)["signature"])]
        for (kernel, key), (function, data) in variants.found.items()
    ]]))

record("image", list_shapes(BUILT_HEAD_DIMS))
biases = [{"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}]
with_biases = [(make_model(hidden_size=576, intermediate_size=1536, **fields), 16) for fields in biases]
record("known models", [known_shape(*each) for each in KNOWN.values()] + with_biases)
RANKS = {
    "Llama-3.1-70B": (2, 4, 8), "Llama-3.1-405B": (8,), "SmolLM2-135M": (), "SmolLM2-360M": (), "Qwen2.5-0.5B": (2,),
}
record("ranks of known models", [
    (*known_shape(*KNOWN[name]), DryRanks(rank, num_ranks))
    for name in KNOWN for num_ranks in RANKS.get(name, (2, 4)) for rank in (0, num_ranks - 1)
])
stages = Variants(90)
with stages.recording(), torch.inference_mode():
    for each in KNOWN.values():
        hand_over(known_shape(*each)[0], Sizes(64, 16, 40, 96, 64))
report("stages of known models", stages)


def in_fp8(shape):
    model, page_size, *ranks = shape
    return replace(model, quantization=Quantization(None)), page_size, *(ranks or [DryRanks(0, 1)]), FP8_CACHE

FP8_RANKS = {"Llama-3.1-405B": (8,), "Llama-3.1-70B": (1, 2, 4), "Qwen2.5-7B": (1, 2), "Qwen2.5-14B": (1, 2, 4)}
record("known models in fp8", [
    in_fp8((*known_shape(*KNOWN[name]), DryRanks(rank, num_ranks)))
    for name in KNOWN for num_ranks in FP8_RANKS.get(name, (1,)) for rank in (0, num_ranks - 1)
] + [in_fp8(each) for each in with_biases])
record("any models", [any_shape() for _ in range(40)])
one = make_model("Qwen3ForCausalLM", vocab_size=50001), 16
record("one start", [one])
others = Variants(90)
with others.recording():
    for num_pages, max_seqs, num_tokens, columns in ((1009, 37, 91, 33), (64, 5, 17, 1), (3, 2, 2, 3)):
        dry_run(*one, sizes=Sizes(num_pages, 0, max_seqs, num_tokens, columns))
report("starts of other numbers", others)
fp8_start, fp8_steps = Variants(90), Variants(90)
fp8_start.record([in_fp8(one)])
with fp8_steps.recording(), torch.inference_mode():
    launch_steps(in_fp8(one))
report("start in fp8", fp8_start)
report("its steps in fp8", fp8_steps)
steps = Variants(90)
with steps.recording(), torch.inference_mode():
    launch_steps(one)
report("its steps", steps)
one_rank = (*one, DryRanks(1, 2))
record("start of a rank", [one_rank])
rank_steps = Variants(90)
with rank_steps.recording(), torch.inference_mode():
    launch_steps(one_rank)
report("its steps as a rank", rank_steps)
"""


@pytest.fixture(scope="module")
def variants() -> dict[str, list[list[str]]]:
    """The variants by who asks for them: kernel, key and types of the arguments."""
    done = run("-c", RECORD)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def missing(asked: list[list[str]], there: list[list[str]]) -> list[list[str]]:
    return [variant for variant in asked if variant not in there]


def test_an_image_holds_every_variant_that_starts_of_known_models_ask_for(variants: dict[str, Any]) -> None:
    assert missing(variants["known models"], variants["image"]) == []
    assert len(variants["image"]) > len(variants["known models"]) > 80


def test_a_model_or_page_of_any_size_needs_no_c_compiler_where_an_image_has_its_modules(
    variants: dict[str, Any],
) -> None:
    there, asked = ([[name, types] for name, _, types in variants[key]] for key in ("image", "any models"))
    assert missing(asked, there) == []
    assert len(missing(variants["any models"], variants["image"])) > 50


def test_how_many_pages_slots_and_tokens_there_are_makes_no_variant(variants: dict[str, Any]) -> None:
    assert missing(variants["starts of other numbers"], variants["one start"]) == []
    assert len(variants["starts of other numbers"]) == len(variants["one start"])


def test_steps_of_every_kind_ask_for_no_variant_that_the_start_did_not(variants: dict[str, Any]) -> None:
    assert missing(variants["its steps"], variants["one start"]) == []
    assert len(variants["its steps"]) == len(variants["one start"])


def kernels_launched_in(source: Path) -> set[str]:
    """Names that are called with a grid: kernel[grid](...)."""
    return {
        node.func.value.id
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }


def test_an_image_holds_every_variant_that_ranks_of_known_models_ask_for(variants: dict[str, Any]) -> None:
    assert missing(variants["ranks of known models"], variants["image"]) == []


def test_an_image_holds_every_variant_that_stages_of_known_models_ask_for(variants: dict[str, Any]) -> None:
    assert missing(variants["stages of known models"], variants["image"]) == []
    assert len(variants["stages of known models"]) == 8  # one of each kernel; three of the one that begins a step


def test_an_image_holds_every_variant_of_models_in_fp8(variants: dict[str, Any]) -> None:
    assert missing(variants["known models in fp8"], variants["image"]) == []
    assert missing(variants["its steps in fp8"], variants["start in fp8"]) == []
    kernels = {name for name, _, _ in variants["its steps in fp8"]}
    assert {"_quantise_kernel", "_quantised_norm_kernel", "_quantised_silu_mul_kernel"} <= kernels


def test_steps_of_a_rank_ask_for_no_variant_that_its_start_did_not(variants: dict[str, Any]) -> None:
    assert missing(variants["its steps as a rank"], variants["start of a rank"]) == []


def test_every_kernel_that_the_engine_launches_is_built(variants: dict[str, Any]) -> None:
    sources = list((ROOT / "engine").rglob("*.py"))
    assert {path.parent for path in sources if "@triton.jit" in path.read_text()} == {KERNELS}
    launched = set().union(*map(kernels_launched_in, KERNELS.glob("*.py")))
    assert launched == {name for name, _, _ in variants["image"]}
    assert len(launched) >= 17
