"""Two GPUs hold a model together: its logits are those of one GPU, and what is sampled of them is what one GPU samples.

Needs two GPUs (of one, see test_async_tensor_parallel). Each test starts two processes, which meet as the workers of
an engine do.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from toka_engine.messages import Tokens

from tests.gpu.test_parity import make
from tests.model.driving import Driver, load
from tests.model.test_tensor_parallel import PROMPTS, SAMPLING

NUM_RANKS, PORT = 2, 10411
SIZES = {
    "max_seqs_per_forward": 600,
    "max_tokens_per_forward": 2048,
    "kv_cache_num_tokens": 65536,
    "cudagraph_max_size": 64,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "layer graphs": {"cudagraph_max_prefill_size": 256},
    "eager": {"use_cudagraphs": False},
    "nccl": {"no_peer_memory": True},
}


@dataclass
class Seen:
    """Holds what one process has seen."""

    logits: list[torch.Tensor] = field(default_factory=list)
    """The logits that each step's sampler was given, over the whole vocabulary."""
    tokens: list[Tokens] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)
    """The ids that the sampler of one GPU makes of these logits."""
    seeded_or_greedy: list[np.ndarray] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    """The greedy tokens of each step, of graphs where there are some."""
    noise: list[list[int]] = field(default_factory=list)
    """The tokens of steps that draw without a seed."""
    forced: list[list[int]] = field(default_factory=list)
    forced_logits: list[torch.Tensor] = field(default_factory=list)
    num_overlapped: list[int] = field(default_factory=list)
    """The sums, so far, that ranks exchanged while a GEMM ran: when the worker was ready, and at the end."""


def watch(driver: Driver, seen: Seen) -> None:
    """Note, for every step that is sampled outside a graph, the whole logits, and what one GPU's sampler samples."""
    from toka_engine.model.cuda.sampler import CudaSampler

    runner = driver.worker.runner
    sampler = runner.sampler

    def sample(logits, rows, plan, state):
        count = plan.slots.size
        own = logits if rows is None else logits.index_select(0, rows.long())
        whole = sampler.widen(own).clone()
        slots = copy.deepcopy(runner._slots)
        single = CudaSampler(0, slots, runner.attention, count, whole.shape[1])
        expected = single(whole.clone(), None, plan.select(np.arange(count)), state)
        seen.expected.append(expected.ids.tolist())
        seen.logits.append(whole.cpu())
        seen.seeded_or_greedy.append(np.union1d(plan.greedy, plan.seeded))
        return sampler(logits, rows, plan, state)

    runner.sample = sample


def drive(folder: Path, ranks: Any, settings: dict[str, Any], forced: list[list[int]] | None = None) -> Seen:
    """Sample in every way, then predict the token behind each of the `forced` sequences (None: this run's own)."""
    options = {key: value for key, value in settings.items() if key != "no_peer_memory"}
    worker = load(folder, ranks, device="cuda", dtype="bfloat16", **{**SIZES, **options})
    worker.warm_up()
    seen, driver = Seen(), Driver(worker)
    overlapped = getattr(worker.runner._parallel, "sums", None)
    seen.num_overlapped = [0 if overlapped is None else overlapped._turn]
    watch(driver, seen)
    parameters = {name: values[: len(PROMPTS)] for name, values in SAMPLING.items()}
    seen.tokens = [driver.prefill(PROMPTS, **driver.add_slots(list(PROMPTS), **parameters))]
    seen.tokens += [driver.decode(list(PROMPTS)) for _ in range(6)]
    driver.reset()
    slots, prompts = list(range(60)), [[5, 9, 11, 30 + slot] * 8 for slot in range(60)]
    first = driver.prefill(dict(enumerate(prompts)), **driver.add_slots(slots)).ids.tolist()
    seen.texts = [first, *(driver.decode(slots).ids.tolist() for _ in range(20))]
    driver.reset()
    driver.prefill({slot: [7, 8] for slot in slots}, **driver.add_slots(slots, temperature=1.0))
    seen.noise = [driver.decode(slots).ids.tolist() for _ in range(20)]
    outputs = np.array(seen.texts).T.tolist()
    seen.forced = forced or [prompts[slot] + outputs[slot][:count] for slot in range(8) for count in range(20)]
    for begin in range(0, len(seen.forced), 32):
        driver.reset()
        batch = dict(enumerate(seen.forced[begin : begin + 32]))
        driver.prefill(batch, **driver.add_slots(list(batch), num_logprobs=0))
        seen.forced_logits.append(seen.logits.pop())
    seen.num_overlapped += [0 if overlapped is None else overlapped._turn]
    return seen


def be_rank(rank: int, folder: Path, meeting: str, settings: dict[str, Any], forced: list[list[int]], out: str) -> None:
    from toka_engine.model.cuda.gpu_ranks import NO_PEER_MEMORY, GpuRanks

    if settings.get("no_peer_memory"):
        os.environ[NO_PEER_MEMORY] = "1"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    seen = drive(folder, GpuRanks(Path(meeting), rank, NUM_RANKS), settings, forced)
    torch.save(seen, f"{out}/{rank}")


def run_ranks(folder: Path, settings: dict[str, Any], forced: list[list[int]]) -> list[Seen]:
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(be_rank, (folder, f"{out}/meeting", settings, forced, out), nprocs=NUM_RANKS)
        return [torch.load(f"{out}/{rank}", weights_only=False) for rank in range(NUM_RANKS)]


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A model, and what one GPU makes of it."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    make(request.param, folder)
    seen = drive(folder, None, {})
    torch.cuda.empty_cache()
    return folder, seen


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_see_the_logits_of_one_gpu_and_sample_from_them_as_it_does(alone: tuple[Path, Seen], name: str) -> None:
    folder, single = alone
    first, second = run_ranks(folder, SETTINGS[name], single.forced)
    check_logits(first, single)
    for ours, theirs in zip(first.tokens, second.tokens, strict=True):
        for column in ("ids", "logprobs", "top_rows", "top_tokens", "top_logprobs"):
            np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
    assert first.texts == second.texts
    assert first.noise == second.noise
    assert len(set(np.array(first.noise).T[:, 5].tolist())) > 10  # rows of one prompt part
    for step, tokens in enumerate(first.tokens):
        check_samples(tokens, first.logits[step], first.expected[step], first.seeded_or_greedy[step])


def check_logits(ours: Seen, single: Seen) -> None:
    """Teacher-forced: the logits of one GPU but for rounding, and so its likeliest tokens."""
    found, wanted = torch.cat(ours.forced_logits), torch.cat(single.forced_logits)
    error = float((found - wanted).norm() / wanted.norm())
    agreement = float((found.argmax(1) == wanted.argmax(1)).float().mean())
    of_graphs = np.mean([np.mean(np.equal(*pair)) for pair in zip(ours.texts[:2], single.texts[:2], strict=True)])
    print(f"error {error:.4f}, teacher-forced agreement {agreement:.3f}, of the first two steps {of_graphs:.3f}")
    assert error < 2e-2
    assert agreement > 0.95
    assert of_graphs > 0.85


def test_ranks_in_fp8_are_as_near_to_bfloat16_as_one_gpu_in_fp8_is(alone: tuple[Path, Seen]) -> None:
    folder, bf16 = alone
    settings = {"quantization": "fp8"}
    single = drive(folder, None, settings, bf16.forced)
    torch.cuda.empty_cache()
    first, second = run_ranks(folder, settings, bf16.forced)
    wanted = torch.cat(bf16.forced_logits)
    errors = [float((torch.cat(each.forced_logits) - wanted).norm() / wanted.norm()) for each in (single, first)]
    print(f"error of one GPU {errors[0]:.4f}, of two {errors[1]:.4f}")
    assert errors[0] > 2e-2, "it has computed in bf16"
    assert errors[1] < 1.3 * errors[0]
    assert first.texts == second.texts
    assert first.noise == second.noise


def check_samples(tokens: Tokens, logits: torch.Tensor, expected: list[int], sure: np.ndarray) -> None:
    """Greedy and seeded tokens are those of one GPU's sampler; logprobs are those of the definition."""
    np.testing.assert_array_equal(tokens.ids[sure], np.array(expected)[sure])
    logprobs = logits.log_softmax(dim=1)
    wanted = logprobs.gather(1, torch.from_numpy(tokens.ids.astype(np.int64))[:, None])[:, 0]
    np.testing.assert_allclose(tokens.logprobs, wanted.numpy(), atol=2e-4)
    if tokens.top_rows.size:
        width = tokens.top_width
        best = logprobs[torch.from_numpy(tokens.top_rows.astype(np.int64))].topk(width, dim=1).values.numpy()
        is_asked = tokens.top_tokens.reshape(-1, width) >= 0
        np.testing.assert_allclose(tokens.top_logprobs.reshape(-1, width)[is_asked], best[is_asked], atol=2e-4)


# ------------------------------------------------------------------ an engine


@contextmanager
def engine(
    folder: Path, *keys: str, size: str = "tp_size=2", **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """A started engine of two ranks, and what reads its log."""
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    command = [
        sys.executable,
        "-m",
        "toka_engine",
        f"model={folder}",
        "served_model_name=m",
        f"port={PORT}",
        size,
    ]
    command += ["kv_cache_num_tokens=65536", *keys]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **variables})
    try:
        deadline = time.monotonic() + 120
        while "component=supervisor logger=toka.supervisor event=ready" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield process, log.read_text
    finally:
        process.kill()
        process.wait()


def ask(prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 12, "ignore_eos": True, **fields}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("served"))


def make_served(folder: Path) -> Path:
    """Make a model with a tokenizer in `folder`."""
    make("Llama", folder)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters, *(f"Ġw{index:06d}" for index in range(998 - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.mark.parametrize(("signum", "code", "limit_s"), [(signal.SIGKILL, 10, 6.0), (signal.SIGSTOP, 11, 20.0)])
def test_a_rank_that_is_killed_or_stopped_ends_the_engine_with_its_name(
    served: Path, signum: signal.Signals, code: int, limit_s: float
) -> None:
    with engine(served) as (process, log):
        first = ask([5, 6, 7], temperature=0)
        assert ask([5, 6, 7], temperature=0)["choices"] == first["choices"]
        pid = int(re.findall(r"event=started process=model_tp1 pid=(\d+)", log())[0])
        os.kill(pid, signum)
        began = time.monotonic()
        assert process.wait(limit_s) == code
        print(f"ended {time.monotonic() - began:.1f} s after {signum.name}")
        assert "model_tp1" in "".join(log().splitlines()[-3:])


def test_without_peer_memory_an_engine_says_so_once_and_serves(served: Path) -> None:
    with engine(served, TOKA_NO_PEER_MEMORY="1") as (_, log):
        assert len(ask([5, 6, 7], temperature=0, logprobs=3)["choices"]) == 1
        assert log().count("event=no_peer_memory") == 1
