"""Two GPUs and a model that has learnt something: SmolLM2's logits are as near to fp32's as those of one GPU are.

Its 9 heads and 3 of the cache divide by no number of GPUs, so it gets heads that read nothing and add nothing: 12 and 4
compute the same function. `nccl` needs two GPUs, other settings (`-k "not nccl"`) may share one.
`TOKA_BUILTIN_DIR` may name a folder with the model.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from toka_engine.builtin import ensure_builtin

from tests.gpu.test_smollm2 import QUESTIONS
from tests.gpu.test_tensor_parallel import NUM_RANKS, SETTINGS, SIZES
from tests.model.driving import Driver, load

NUM_TOKENS, BATCH = 80, 16
HEAD_DIM, HEADS, KV_HEADS = 64, (9, 12), (3, 4)  # as published, and with more that do nothing


def pad(weight: torch.Tensor, dim: int, heads: tuple[int, int]) -> torch.Tensor:
    """Append heads of zeros along `dim`."""
    missing = list(weight.shape)
    missing[dim] = (heads[1] - heads[0]) * HEAD_DIM
    return torch.cat([weight, weight.new_zeros(missing)], dim)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with heads that two GPUs can share."""
    source, folder = ensure_builtin(), tmp_path_factory.mktemp("padded")
    config = json.loads((source / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS[0], KV_HEADS[0])
    config |= {"num_attention_heads": HEADS[1], "num_key_value_heads": KV_HEADS[1], "head_dim": HEAD_DIM}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = pad(weight, 0, KV_HEADS)
        elif "q_proj" in name:
            weights[name] = pad(weight, 0, HEADS)
        elif "o_proj" in name:
            weights[name] = pad(weight, 1, HEADS).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def find_next(folder: Path, ranks: Any, settings: dict[str, Any], texts: list[list[int]]) -> torch.Tensor:
    """Return the logits [len(texts), vocabulary] behind each of the texts, in batches of prompts."""
    options = {key: value for key, value in settings.items() if key != "no_peer_memory"}
    worker = load(folder, ranks, device="cuda", dtype="bfloat16", **{**SIZES, "kv_cache_num_tokens": 131072, **options})
    worker.warm_up()
    driver, sampler, seen = Driver(worker), worker.runner.sampler, []

    def sample(logits: torch.Tensor, rows: torch.Tensor | None, plan: Any, state: Any) -> Any:
        own = logits if rows is None else logits.index_select(0, rows.long())
        seen.append(sampler.widen(own).float().cpu())
        return sampler(logits, rows, plan, state)

    worker.runner.sample = sample
    for begin in range(0, len(texts), BATCH):
        driver.reset()
        batch = dict(enumerate(texts[begin : begin + BATCH]))
        driver.prefill(batch, **driver.add_slots(list(batch), num_logprobs=0))
    return torch.cat(seen)


def be_rank(rank: int, folder: Path, meeting: str, settings: dict[str, Any], texts: list[list[int]], out: str) -> None:
    from toka_engine.model.cuda.gpu_ranks import NO_PEER_MEMORY, GpuRanks

    if settings.get("no_peer_memory"):
        os.environ[NO_PEER_MEMORY] = "1"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.save(find_next(folder, GpuRanks(Path(meeting), rank, NUM_RANKS), settings, texts), f"{out}/{rank}")


def write(folder: Path) -> tuple[list[list[int]], torch.Tensor]:
    """The beginnings of SmolLM2's own answers, written greedily by transformers in fp32, and the logits behind each."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ensure_builtin())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    texts, logits = [], []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].cuda()
        answer = model.generate(ids, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
        with torch.inference_mode():
            logits.append(model(answer).logits[0, ids.shape[1] - 1 : -1].cpu())
        texts += [answer[0, :end].tolist() for end in range(ids.shape[1], answer.shape[1])]
    return texts, torch.cat(logits)


@dataclass(frozen=True, slots=True)
class Reference:
    """The texts, and the logits behind them of transformers in fp32 and of one GPU in bfloat16."""

    texts: list[list[int]]
    exact: torch.Tensor
    single: torch.Tensor


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    texts, exact = write(folder)
    found = Reference(texts, exact, find_next(folder, None, {}, texts))
    torch.cuda.empty_cache()
    return found


def count_agreeing(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((logits.argmax(1) == wanted.argmax(1)).float().mean())


@pytest.mark.parametrize("name", SETTINGS)
def test_two_gpus_are_as_near_to_fp32_as_one_and_differ_from_it_in_near_ties(
    folder: Path, reference: Reference, name: str
) -> None:
    """Two GPUs round other sums to bfloat16 than one does: each of both is compared with fp32."""
    texts, exact, single = reference.texts, reference.exact, reference.single
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(be_rank, (folder, f"{out}/meeting", SETTINGS[name], texts, out), nprocs=NUM_RANKS)
        first, second = (torch.load(f"{out}/{rank}") for rank in range(NUM_RANKS))
    assert torch.equal(first, second)
    shares = [count_agreeing(*pair) for pair in ((single, exact), (first, exact), (first, single))]
    errors = [float((logits - exact).norm() / exact.norm()) for logits in (single, first)]
    lost = single.max(1).values - single.gather(1, first.argmax(1, keepdim=True))[:, 0]
    print(
        f"{len(texts)} tokens; one GPU and fp32 {shares[0]:.4f}, two and fp32 {shares[1]:.4f}, two and one "
        f"{shares[2]:.4f}; errors {errors[0]:.4f}, {errors[1]:.4f}; the largest near tie {float(lost.max()):.3f}"
    )
    assert shares[1] >= shares[0] - 0.01
    assert errors[1] <= 1.2 * errors[0]
    assert float(lost.max()) < 0.5
