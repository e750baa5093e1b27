"""The engine where Linux's own calls and files are missing, as on macOS: they are taken away, and it runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toka_engine.errors import ExitCode
from toka_engine.model.memory import count_threads, read_limit_bytes

from tests.engine_process import ROOT, WAIT_S, EngineProcess, is_alive
from tests.unit.server.harness import running_server

_TAKE_AWAY = """
import builtins, ctypes, io, os, pathlib, sys
del os.pipe2, os.sched_getaffinity

class Library:
    def __getattr__(self, name):
        raise AttributeError(name)

load = ctypes.CDLL
ctypes.CDLL = lambda name, *args, **options: Library() if name is None else load(name, *args, **options)
opened = io.open

def open_but_for_linux(file, *args, **options):
    if str(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(file)
    return opened(file, *args, **options)

io.open = builtins.open = open_but_for_linux
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that find neither the calls nor the files."""
    (tmp_path / "sitecustomize.py").write_text(_TAKE_AWAY)
    return {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT / "operator", ROOT / "engine", ROOT)))}


@pytest.fixture
def engine(elsewhere: dict[str, str], tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine of stand-ins that is ready."""
    (tmp_path / "model").mkdir()
    module = "tests.unit.engine.standins.engine"
    with EngineProcess(tmp_path, f"model={tmp_path / 'model'}", module=module, env=elsewhere) as engine:
        engine.wait_ready()
        yield engine


def test_an_engine_starts_drains_and_leaves_nothing(engine: EngineProcess) -> None:
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK
    assert not any(map(is_alive, engine.children.values()))


def test_children_end_with_their_parent_without_the_kernels_help(engine: EngineProcess) -> None:
    engine.signal(signal.SIGKILL)
    engine.wait_end()
    deadline = time.monotonic() + WAIT_S
    while any(map(is_alive, engine.children.values())):
        assert time.monotonic() < deadline, "children are left"
        time.sleep(0.05)


def test_a_server_answers_and_frees_large_bodies(elsewhere: dict[str, str], tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, env=elsewhere) as server:
        body = b'{"model":"smollm2","prompt":"' + b"x" * (2 << 20) + b'"}'
        status, _ = server.post("/v1/completions", body)
        assert status == 400
        assert server.request("GET", "/livez")[0] == 200


def test_memory_and_cpus_are_those_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert read_limit_bytes(tmp_path / "none", tmp_path / "meminfo") == whole // 2
    assert count_threads(tmp_path / "none") == os.cpu_count()
