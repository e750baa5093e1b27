"""`LLM` and `AsyncLLM`: an engine inside a script, its answers, its errors, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from toka_engine import LLM, AsyncLLM
from toka_engine.errors import (
    ConfigError,
    EngineDiedError,
    ModelInvalidError,
    ModelNotFoundError,
    RequestError,
)
from toka_engine.offline import Output

from tests.engine_process import ROOT, WAIT_S, is_alive

CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1, "kv_cache_num_tokens": 16384}
QUESTION = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module", autouse=True)
def _children_find_the_source() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "engine"), str(ROOT)]))
        patch.setenv("OMP_WAIT_POLICY", "passive")
        yield


@pytest.fixture(scope="module")
def talking(tiny: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("talking") / "talking"
    shutil.copytree(tiny, folder)
    shutil.copy(model_dir / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="module")
def llm(talking: Path) -> Iterator[LLM]:
    with LLM(str(talking), **CPU) as llm:
        yield llm


def processes_of(run: Any) -> list[psutil.Process]:
    """The engine's processes: every descendant of ours that was not there before `run`."""
    known = {process.pid for process in psutil.Process().children(recursive=True)}
    run()
    return [process for process in psutil.Process().children(recursive=True) if process.pid not in known]


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + WAIT_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "processes of the engine are left"
        time.sleep(0.05)


# ---------------------------------------------------------------- answers


def test_outputs_come_in_the_order_of_the_prompts_however_many_there_are(llm: LLM) -> None:
    prompts = [f"Number {number} is" for number in range(300)]  # more than there are requests at once
    outputs = llm.generate(prompts, max_tokens=2, temperature=0, ignore_eos=True)
    assert [output.prompt for output in outputs] == prompts
    for place in (0, 1, 2, 255, 256, 299):
        assert (
            outputs[place].choices
            == llm.generate(prompts[place], max_tokens=2, temperature=0, ignore_eos=True)[0].choices
        )


def test_prompts_may_be_texts_and_ids_and_each_has_n_choices(llm: LLM) -> None:
    outputs = llm.generate(["The sea", [504, 3132]], n=3, max_tokens=4, ignore_eos=True)
    assert [[choice.index for choice in output.choices] for output in outputs] == [[0, 1, 2], [0, 1, 2]]
    assert {choice.finish_reason for output in outputs for choice in output.choices} == {"length"}
    assert len(llm.generate([504, 3132], max_tokens=1)) == 1
    assert llm.generate([], max_tokens=1) == []


def test_a_seed_repeats_samples_and_none_does_not(llm: LLM) -> None:
    def sample(**options: Any) -> list[str]:
        return llm.generate("The sea", n=4, max_tokens=8, ignore_eos=True, **options)[0].texts

    assert sample(seed=5) == sample(seed=5)
    assert len({*sample(seed=5)}) == 4
    assert not {*sample(seed=None)} & {*sample()}


def test_a_stream_is_the_whole_answer_piece_by_piece(llm: LLM) -> None:
    options: dict[str, Any] = {"n": 2, "max_tokens": 12, "seed": 3, "ignore_eos": True}
    texts, reasons = ["", ""], {}
    for piece in llm.stream("The sea", **options):
        texts[piece.index] += piece.text
        reasons |= {piece.index: piece.finish_reason} if piece.finish_reason else {}
    assert texts == llm.generate("The sea", **options)[0].texts
    assert reasons == {0: "length", 1: "length"}


def test_a_stream_that_is_left_early_holds_nothing_up(llm: LLM) -> None:
    for _ in range(3):
        for _piece in llm.stream("The sea", max_tokens=400, ignore_eos=True):
            break
    assert len(llm.generate("The sea", max_tokens=4, ignore_eos=True)[0].texts) == 1


def test_chat_takes_one_conversation_or_several_and_streams(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    (one,) = llm.chat(QUESTION, **options)
    several = llm.chat([QUESTION, QUESTION], **options)
    assert [output.texts for output in several] == [one.texts, one.texts]
    assert "".join(piece.text for piece in llm.stream_chat(QUESTION, **options)) == one.texts[0]


def test_logprobs_name_tokens_by_their_ids_in_completions_and_chat_alike(llm: LLM) -> None:
    outputs: list[Output] = [
        llm.generate("The sea", max_tokens=5, logprobs=2, ignore_eos=True)[0],
        llm.chat(QUESTION, max_tokens=5, logprobs=2, ignore_eos=True)[0],
    ]
    for output in outputs:
        logprobs = output.choices[0].logprobs
        assert logprobs is not None
        assert len(logprobs.token_ids) == len(logprobs.logprobs) == len(logprobs.tops) == 5
        for token, logprob, tops in zip(logprobs.token_ids, logprobs.logprobs, logprobs.tops, strict=True):
            assert tops[token] == logprob
            assert 2 <= len(tops) <= 3
    streamed = [piece.logprobs for piece in llm.stream("The sea", max_tokens=5, logprobs=0, ignore_eos=True)]
    assert sum(len(one.token_ids) for one in streamed if one) == 5
    assert llm.generate("The sea", max_tokens=1)[0].choices[0].logprobs is None


def test_outputs_follow_a_grammar(llm: LLM) -> None:
    choices = {"choice": ["left", "right"]}
    for output in llm.generate(["one", "two"], n=3, temperature=1.0, structured_outputs=choices):
        assert set(output.texts) <= {"left", "right"}
    schema = {"type": "integer", "minimum": 10, "maximum": 12}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert llm.chat(QUESTION, response_format=form, max_tokens=8)[0].texts[0] in ("10", "11", "12")


def test_threads_may_share_an_engine(llm: LLM) -> None:
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda number: llm.generate(f"{number} is", max_tokens=2)[0], range(24)))
    assert [output.prompt for output in outputs] == [f"{number} is" for number in range(24)]


# ---------------------------------------------------------------- errors


def test_a_wrong_option_is_named_and_the_engine_goes_on(llm: LLM) -> None:
    with pytest.raises(RequestError, match="'temperature' must be from 0 to 2") as caught:
        llm.generate(["a", "b"], temperature=5)
    assert (caught.value.param, caught.value.status) == ("temperature", 400)
    with pytest.raises(RequestError, match="Unknown field: 'beams'"):
        llm.chat(QUESTION, beams=2)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="'n'"):
        list(llm.stream("a", n=0))
    assert llm.generate("a", max_tokens=1)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ConfigError, "unknown key 'page_sizes' .did you mean 'page_size'", {"page_sizes": 3}),
        (ConfigError, "page_size=0", {"page_size": 0}),
        (ConfigError, "port has no effect in a script", {"port": 8000}),
        (ConfigError, "status_page has no effect in a script", {"status_page": True}),
        (ConfigError, "vllm_metric_names has no effect in a script", {"vllm_metric_names": False}),
        (ModelNotFoundError, "there is no folder /nowhere", {"model": "/nowhere"}),
        (ModelInvalidError, r"docs/(config|tokenizer)\.json is missing|config\.json", {"model": str(ROOT / "docs")}),
    ],
)
def test_an_engine_that_cannot_start_raises_why(error: type[Exception], words: str, settings: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        LLM(**{**CPU, **settings})


# ---------------------------------------------------------------- the end


def test_nothing_listens_beyond_the_script_and_closing_leaves_nothing(talking: Path, tmp_path: Path) -> None:
    opened: list[LLM] = []
    processes = processes_of(lambda: opened.append(LLM(str(talking), **CPU)))
    (llm,) = opened
    assert len(processes) == 4
    assert [found for process in processes for found in process.net_connections("inet")] == []
    folder = Path(llm._llm._engine.socket_path).parent
    assert folder.stat().st_mode & 0o77 == 0
    llm.close()
    llm.close()
    wait_gone([process.pid for process in processes])
    assert not folder.exists()
    with pytest.raises(EngineDiedError, match="closed"):
        llm.generate("a")


def test_an_engine_that_dies_raises_in_every_call_and_leaves_nothing(talking: Path) -> None:
    opened: list[LLM] = []
    processes = processes_of(lambda: opened.append(LLM(str(talking), **CPU)))
    (llm,) = opened
    (worker,) = [process for process in processes if "toka_engine.model" in process.cmdline()]
    with llm, ThreadPoolExecutor(1) as pool:
        pieces = llm.stream("The sea", max_tokens=450, n=8, ignore_eos=True)
        next(pieces)
        waiting = pool.submit(llm.generate, "The sea", max_tokens=450, n=64, ignore_eos=True)
        worker.send_signal(signal.SIGKILL)
        with pytest.raises(EngineDiedError, match=r"model was ended by SIGKILL"):
            list(pieces)
        with pytest.raises(EngineDiedError, match=r"model was ended by SIGKILL"):
            waiting.result(WAIT_S)
        with pytest.raises(EngineDiedError, match=r"model was ended by SIGKILL"):
            llm.generate("The sea")
    wait_gone([process.pid for process in processes])


_SCRIPT = """
import sys
from toka_engine import LLM
llm = LLM(sys.argv[1], device="cpu", num_threads=1, kv_cache_num_tokens=4096)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_the_engine_ends_with_the_script_however_that_ends(talking: Path, is_killed: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(talking)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdin is not None
        assert script.stdout is not None
        assert script.stdout.readline() == "ready\n"
        pids = [process.pid for process in psutil.Process(script.pid).children(recursive=True)]
        assert len(pids) == 4
        if is_killed:
            script.kill()
        script.stdin.close()
        script.wait(WAIT_S)
    wait_gone(pids)


async def test_the_asyncio_form_does_the_same(talking: Path) -> None:
    async with AsyncLLM(str(talking), **CPU) as llm:
        several, chat, streamed = await asyncio.gather(
            llm.generate(["The sea", "The sky"], n=2, max_tokens=4, ignore_eos=True),
            llm.chat(QUESTION, max_tokens=4, ignore_eos=True),
            collect(llm),
        )
        assert [len(output.texts) for output in several] == [2, 2]
        assert len(chat[0].texts) == 1
        assert streamed == (await llm.generate("The sea", max_tokens=6, temperature=0, ignore_eos=True))[0].texts[0]
        task = asyncio.create_task(llm.generate("The sea", n=64, max_tokens=450, ignore_eos=True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with pytest.raises(EngineDiedError, match="closed"):
        await llm.generate("a")


async def collect(llm: AsyncLLM) -> str:
    return "".join([piece.text async for piece in llm.stream("The sea", max_tokens=6, temperature=0, ignore_eos=True)])
