"""torch_compile=T in a worker's process: what it needs of the machine, and what a second start finds again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toka_engine.control_messages import Failed
from toka_engine.errors import ExitCode
from toka_engine.messages import WorkerReady

from tests.model.test_worker import TIMEOUT_S, Process, receive_one, start_process

SAYS = "x.cpp:1:10: fatal error: Python.h: No such file or directory"


@pytest.fixture
def folder(make_tiny: Callable[..., tuple[Any, Path]]) -> Path:
    return make_tiny()[1]


@contextmanager
def started(folder: Path, cache: Path, **env: str) -> Iterator[Process]:
    """A worker that compiles, with a cache folder of its own."""
    env = {"TOKA_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": "", **env}
    with (folder / "log").open("wb") as log:
        process = start_process(folder, env, log.fileno(), torch_compile=True)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()
        process.control.close()
        process.link.close()


def check_refusal(process: Process, folder: Path, code: ExitCode, *words: str) -> None:
    fatal = receive_one(process.control, Failed)
    assert all(word in fatal.message for word in words), fatal.message
    assert "\n" not in fatal.message
    assert fatal.exit_code == process.popen.wait(TIMEOUT_S) == code
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A compiler that fails as soon as there is a file `broken` beside it."""
    real = shutil.which("g++")
    assert real is not None
    script = tmp_path / "compiler" / "g++"
    script.parent.mkdir()
    fails = f'case "$*" in *-c*|*-o*) [ -e {script.parent}/broken ] && {{ echo "{SAYS}" >&2; exit 1; }} ;; esac'
    script.write_text(f'#!/bin/sh\n{fails}\nexec {real} "$@"\n')
    script.chmod(0o755)
    return script


def test_a_second_start_compiles_nothing_again(folder: Path, tmp_path: Path, compiler: Path) -> None:
    cache = tmp_path / "cache"
    with started(folder, cache, CXX=str(compiler)) as process:
        receive_one(process.link, WorkerReady)
    assert list((cache / "torch_compile").glob("*/**/*.so"))
    (compiler.parent / "broken").touch()
    with started(folder, cache, CXX=str(compiler)) as process:
        receive_one(process.link, WorkerReady)


def test_a_compiler_that_fails_is_told_in_its_own_words(folder: Path, tmp_path: Path, compiler: Path) -> None:
    (compiler.parent / "broken").touch()
    with started(folder, tmp_path / "cache", CXX=str(compiler)) as process:
        check_refusal(process, folder, ExitCode.CONFIG_INVALID, "torch_compile=T: the C++ compiler fails: ", SAYS)


def test_a_machine_without_a_compiler_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    with started(folder, tmp_path / "cache", CXX="g++", PATH=str(tmp_path)) as process:
        check_refusal(process, folder, ExitCode.CONFIG_INVALID, "torch_compile=T needs a C++ compiler on a CPU")


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    with started(folder, tmp_path, TORCHINDUCTOR_CACHE_DIR="/proc/toka") as process:
        check_refusal(
            process, folder, ExitCode.STORAGE_FAILED, "the cache of torch_compile /proc/toka cannot be written"
        )
