"""Real tensor parallel ranks and pipeline stages on CPUs: killed, stopped, late and astray, while they start and while
they serve.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from toka_engine.builtin import ensure_builtin
from toka_engine.errors import ExitCode

from tests.engine_process import EngineProcess, is_alive
from tests.fault.test_processes import ENDED_S, Request, assert_ended, wait_not_ready
from tests.model.conftest import TINY

VICTIM = "model_tp1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that two ranks can hold, with the tokenizer of the built-in one."""
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(7)
    sizes = {**TINY, "vocab_size": 49152, "max_position_embeddings": 4096}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).float().save_pretrained(folder)
    shutil.copy(ensure_builtin() / "tokenizer.json", folder)
    return folder


@contextmanager
def running_ranks(root: Path, folder: Path, fault: str = "", size: str = "tp_size=2") -> Iterator[EngineProcess]:
    temporary = root / "temporary"
    temporary.mkdir()
    common = ("device=cpu", "dtype=float32", "served_model_name=m", "kv_cache_num_tokens=16384", "num_threads=1")
    env = {"TMPDIR": str(temporary), "TOKA_TEST_FAULT": fault}
    module = "tests.fault.wayward" if fault else "toka_engine"
    with EngineProcess(root, f"model={folder}", size, *common, module=module, env=env) as engine:
        yield engine
        assert not list(temporary.iterdir()), "the ranks' folder is left"


@pytest.mark.parametrize(
    ("size", "killed", "stopped"),
    [
        ("tp_size=2", VICTIM, VICTIM),
        ("pp_size=2", "model_pp1", "model_pp0"),
        ("pp_size=2", "model_pp0", "model_pp1"),
    ],
)
def test_a_killed_or_stopped_rank_ends_streams_with_an_error_and_is_named(
    tmp_path: Path, folder: Path, size: str, killed: str, stopped: str
) -> None:
    for number, (signum, victim, code) in enumerate(
        [(signal.SIGKILL, killed, ExitCode.PROCESS_DIED), (signal.SIGSTOP, stopped, ExitCode.PROCESS_STALLED)]
    ):
        root = tmp_path / str(number)
        root.mkdir()
        with running_ranks(root, folder, size=size) as engine:
            engine.wait_ready()
            request = Request(engine, stream=True)
            assert request.first_chunk.wait(60.0)
            engine.signal(signum, victim)
            began_s = time.monotonic()
            wait_not_ready(engine)
            request.wait()
            assert b'"error"' in request.body.strip().rpartition(b"data:")[2]
            assert_ended(engine, code, victim)
            print(f"{signum.name}: ended after {time.monotonic() - began_s:.2f} s")


@pytest.mark.parametrize(
    ("size", "fault", "code", "words"),
    [
        ("tp_size=2", "late", ExitCode.PROCESS_STALLED, "model_tp1 has not begun step 8; model_tp0 waits for it"),
        (
            "tp_size=2",
            "stuck",
            ExitCode.PROCESS_STALLED,
            "model_tp1 is still in step 8; model_tp0 is in step 9 and waits for it",
        ),
        ("tp_size=2", "disagreeing", ExitCode.PROCESS_DIED, "the ranks disagree on a step: model_tp0 has number="),
        ("pp_size=2", "late", ExitCode.PROCESS_STALLED, "model_pp1 has not begun step 8; model_pp0 waits for it"),
        ("pp_size=2", "disagreeing", ExitCode.PROCESS_DIED, "the ranks disagree on a step: model_pp0 has number="),
    ],
)
def test_a_rank_that_goes_astray_is_named_and_waiting_requests_get_503(
    tmp_path: Path, folder: Path, size: str, fault: str, code: ExitCode, words: str
) -> None:
    with running_ranks(tmp_path, folder, fault, size) as engine:
        engine.wait_ready()
        assert Request(engine, max_tokens=200).wait() == 503
        assert_ended(engine, code, words)
        assert fault != "disagreeing" or re.search(r"model_(tp|pp)1 has number=10", engine.last_words())


@pytest.mark.parametrize(
    "moment", ["event=started process=model_tp1", "process=model_tp1 phase=load", "process=model_tp0 phase=warm-up"]
)
def test_a_rank_that_is_stopped_while_the_engine_starts_is_named(tmp_path: Path, folder: Path, moment: str) -> None:
    """Before it meets the others, while it loads, and in the warm-up, where its peer waits in an exchange."""
    with running_ranks(tmp_path, folder) as engine:
        engine.wait_for_log(moment)
        engine.signal(signal.SIGSTOP, VICTIM)
        assert_ended(engine, ExitCode.PROCESS_STALLED, VICTIM)


def test_a_rank_that_dies_before_it_meets_the_others_holds_up_nobody(tmp_path: Path, folder: Path) -> None:
    with running_ranks(tmp_path, folder) as engine:
        engine.wait_for_log(f"event=started process={VICTIM}")
        engine.signal(signal.SIGKILL, VICTIM)
        assert_ended(engine, ExitCode.PROCESS_DIED, f"{VICTIM} was ended by SIGKILL")


def test_nothing_is_left_of_an_engine_whose_supervisor_is_killed(tmp_path: Path, folder: Path) -> None:
    with running_ranks(tmp_path, folder) as engine, ExitStack() as pidfds:
        engine.wait_ready()
        request = Request(engine, stream=True)
        assert request.first_chunk.wait(60.0)
        ends = [os.pidfd_open(pid) for pid in engine.children.values()]
        for end in ends:
            pidfds.callback(os.close, end)
        engine.signal(signal.SIGKILL)
        engine.wait_end()
        assert all(select.select([end], [], [], ENDED_S)[0] for end in ends)
        assert not any(map(is_alive, engine.children.values()))
