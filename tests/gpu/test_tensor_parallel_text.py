"""Two GPUs and a model that has learnt something: SmolLM2's likeliest tokens are those of one GPU, but for near ties.

Its 9 heads and 3 of the cache divide by no number of GPUs, so it gets heads that read nothing and add nothing: 12 and 4
compute the same function. Needs two GPUs; `TOKA_BUILTIN_DIR` may name a folder with the model.
"""

from __future__ import annotations

import json
import os
import tempfile
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

NUM_TOKENS, BATCH = 80, 64
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
        for slot, text in batch.items():  # a step holds at most SIZES["max_tokens_per_forward"] tokens
            driver.prefill({slot: text}, **driver.add_slots([slot], num_logprobs=0))
    return torch.cat(seen)


def be_rank(rank: int, folder: Path, meeting: str, settings: dict[str, Any], texts: list[list[int]], out: str) -> None:
    from toka_engine.model.cuda.gpu_ranks import NO_PEER_MEMORY, GpuRanks

    if settings.get("no_peer_memory"):
        os.environ[NO_PEER_MEMORY] = "1"
    torch.cuda.set_device(rank)
    torch.save(find_next(folder, GpuRanks(Path(meeting), rank, NUM_RANKS), settings, texts), f"{out}/{rank}")


def write(folder: Path) -> list[list[int]]:
    """The beginnings of SmolLM2's own answers, as transformers writes them greedily in fp32."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ensure_builtin())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    texts = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].cuda()
        answer = model.generate(ids, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
        texts += [answer[:end] for end in range(ids.shape[1], len(answer))]
    return texts


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[list[int]], torch.Tensor]:
    texts = write(folder)
    found = texts, find_next(folder, None, {}, texts)
    torch.cuda.empty_cache()
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_two_gpus_have_the_likeliest_tokens_of_one(
    folder: Path, alone: tuple[list[list[int]], torch.Tensor], name: str
) -> None:
    texts, single = alone
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(be_rank, (folder, f"{out}/meeting", SETTINGS[name], texts, out), nprocs=NUM_RANKS)
        first, second = (torch.load(f"{out}/{rank}") for rank in range(NUM_RANKS))
    assert torch.equal(first, second)
    agrees = first.argmax(1) == single.argmax(1)
    lost = single.max(1).values - single.gather(1, first.argmax(1, keepdim=True))[:, 0]
    error = float((first - single).abs().max())
    share = float(agrees.float().mean())
    print(f"agreement {share:.4f} of {len(texts)}, largest error {error:.3f}, of a choice {float(lost.max()):.3f}")
    assert share >= 0.99
    assert float(lost.max()) <= 2 * error
    assert float(lost.max()) < 0.5
