"""The soak passes on a healthy engine, and sees each promise that breaks."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toka_engine.benchmarks.engine import running_engine as benchmarked_engine
from toka_engine.benchmarks.soak import judge, judge_far
from toka_engine.benchmarks.soak_check import Agreement, Difference, check_greedy
from toka_engine.benchmarks.soak_reference import ask_reference
from toka_engine.benchmarks.soak_traffic import Greedy, read_token_ids
from toka_engine.command_line import parse_config

from tests.api.conftest import client_of, running_engine
from tests.engine_process import ROOT, hold_port


@pytest.mark.slow
def test_a_healthy_engine_passes(tiny: Path) -> None:
    options = ("minutes=0.15", "clients=24", "tie=0.001", "growth=1000", "checkers=4")
    held, port = hold_port()
    settings = ("dtype=float32", "device=cpu", "kv_cache_num_tokens=2048", "num_threads=1", f"port={port}")
    with held:
        result = subprocess.run(
            [sys.executable, "-m", "toka_engine.benchmarks.soak", str(tiny), *options, *settings],
            env={**os.environ, "PYTHONPATH": str(ROOT / "engine")},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    report = json.loads(result.stdout)
    assert report["broken"] == []
    assert report["requests"]["answered"] > 0
    assert report["requests"]["left"] > 0
    assert report["greedy"]["tokens"] > 0
    assert report["greedy"]["checked"] == report["greedy"]["answers"]
    assert report["engine_output_tokens"] > 0


def test_an_answer_that_the_engine_would_not_give_is_seen(tiny: Path, tmp_path: Path) -> None:
    prompt = [1000, 1001, 1002]
    with running_engine(tmp_path, f"model={tiny}", "dtype=float32") as engine, client_of(engine) as client:
        answer = client.completions.create(
            model="m",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        true = tuple(read_token_ids(logprobs.tokens))
        forged = (*true[:5], 2000, *true[6:])

        def check(tokens: tuple[int, ...], seconds: float = 60.0) -> Agreement:
            answers = [Greedy(tuple(prompt), tokens)]
            return asyncio.run(check_greedy(engine.url, "m", answers, 1, seconds, 0))

        assert check(true).differences == []
        difference = check(forged).differences[0]
        assert difference.gap > 0.1
        assert (difference.prompt, difference.token) == ((*prompt, *true[:5]), 2000)
        assert true[5] in difference.top
        report = json.loads(json.dumps(difference.describe(), allow_nan=False))
        assert report["prompt"] == " ".join(map(str, difference.prompt))
        assert check(true).num_answers == 1
        assert check(true, seconds=0.0).num_answers == 0


def test_no_other_server_is_taken_for_the_engine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        engine = benchmarked_engine("model=any", f"port={port}")
        with pytest.raises(SystemExit, match=f"port: {port} is in use"), engine:
            pass


def differing(gap: float) -> Difference:
    return Difference(gap, prompt=(1,), token=2, top={3: -0.5})


BROKEN = {
    "an answer": (["status 500"], {}, Agreement(10), {}, {}),
    "a page held": ([], {"toka_kv_pages_used": 3.0}, Agreement(10), {}, {}),
    "nothing to check": ([], {}, Agreement(0), {}, {}),
    "no agreement": ([], {}, Agreement(100, differences=[differing(0.01)] * 2), {}, {}),
    "a process that grows": ([], {}, Agreement(10), {"server": 1.5}, {}),
    "a device that fills": ([], {}, Agreement(10), {}, {"ready": 70_000, "most": 70_065}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_promise_is_named(name: str) -> None:
    assert len(judge(*BROKEN[name], max_growth=1.0, max_late_mib=64)) == 1


def test_few_differences_and_small_growth_break_nothing() -> None:
    agreement, device_mib = Agreement(1000, differences=[differing(0.2)] * 10), {"ready": 70_000, "most": 70_064}
    assert judge([], {}, agreement, {"server": 0.9}, device_mib, max_growth=1.0, max_late_mib=64) == []


def test_only_differences_beyond_the_tie_go_to_the_reference_the_farthest_last() -> None:
    agreement = Agreement(1000, differences=[differing(gap) for gap in (math.inf, 0.2, 0.6, 0.5)])
    assert [each.gap for each in agreement.far(0.5)] == [0.6, math.inf]
    assert judge_far(Path("nothing is read"), [], agreement.far(math.inf)) == ([], [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_tells_near_ties_from_others(tiny: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts = [tuple(range(300, 300 + length)) for length in (3, 40)]
    exact = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.inference_mode():
        logits = [exact(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    best, worst = [[int(pick(row)) for row in logits] for pick in (torch.argmax, torch.argmin)]
    far = [Difference(math.inf, prompts[0], best[0], {}), Difference(0.7, prompts[1], worst[1], {3: -0.5})]
    arguments = [f"model={tiny}", f"dtype={dtype}", "device=cpu"]

    verdicts = ask_reference(tiny, parse_config(arguments), far)
    assert [verdict.is_near_tie for verdict in verdicts] == [True, False]
    assert verdicts[0].gap == 0.0
    assert verdicts[1].gap == pytest.approx(float(logits[1].max() - logits[1].min()), rel=1e-4)
    assert all((verdict.noise > 0) == (dtype == "bfloat16") for verdict in verdicts)

    described, broken = judge_far(tiny, arguments, far[::-1])
    assert [each["token"] for each in described] == [best[0], worst[1]]
    assert described[1]["reference"]["gap"] == verdicts[1].gap
    assert broken == [f"1 greedy tokens were no near ties, the farthest by {verdicts[1].gap:.3f} nats"]
    assert judge_far(tiny, arguments, far[:1])[1] == []


def test_a_model_that_transformers_cannot_load_loses_nothing_else(tmp_path: Path) -> None:
    described, broken = judge_far(tmp_path, [f"model={tmp_path}", "device=cpu"], [differing(0.7)])
    assert described == [differing(0.7).describe()]
    assert broken[0].startswith("transformers cannot judge 1 greedy tokens: ")


def test_a_device_with_too_little_memory_for_the_reference_loses_nothing_else(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room for float32")

    monkeypatch.setattr("toka_engine.benchmarks.soak_reference._compute_logits", refuse)
    described, broken = judge_far(tiny, [f"model={tiny}", "device=cpu"], [differing(0.7)])
    assert described == [differing(0.7).describe()]
    assert broken == ["transformers cannot judge 1 greedy tokens: no room for float32"]
