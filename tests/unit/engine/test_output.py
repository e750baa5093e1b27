"""`COMMAND | head`: every command ends without a word when the reader of its output goes, and what serves goes on."""

from __future__ import annotations

import ast
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toka_engine.errors import ExitCode

from tests.engine_process import ROOT, hold_port
from tests.marks import rest_is_slow

_SIGPIPE_CODES = (141, -signal.SIGPIPE)
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("operator", "engine", "."))}

COMMANDS = {
    "toka --help": ["toka_engine", "--help"],
    "toka --version": ["toka_engine", "--version"],
    "toka-ping": ["toka_engine.scripts.ping", "--help"],
    "toka-download": ["toka_engine.scripts.download", "--help"],
    "benchmarks": ["toka_engine.benchmarks"],
    "throughput": ["toka_engine.benchmarks.throughput", "--help"],
    "soak": ["toka_engine.benchmarks.soak", "--help"],
    "harness": ["tests.cluster.harness", "--help"],
}


def run_without_reader(*arguments: str, reads: str = "stderr", **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` with a pipe that nobody reads as its stdout (`reads` "stdout": as its stderr)."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    streams = {"stdout": write_end, "stderr": subprocess.PIPE}
    if reads == "stdout":
        streams = {"stdout": subprocess.PIPE, "stderr": write_end}
    try:
        return subprocess.run(
            [sys.executable, "-m", *arguments], **streams, env=_ENVIRONMENT | env, cwd=ROOT, text=True, timeout=60
        )
    finally:
        os.close(write_end)


@pytest.mark.parametrize("command", rest_is_slow(COMMANDS.keys() - {"throughput"}, COMMANDS))
def test_a_command_whose_output_is_read_says_something_and_ends_well(command: str) -> None:
    arguments = [sys.executable, "-m", *COMMANDS[command]]
    done = subprocess.run(arguments, env=_ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize("command", rest_is_slow(COMMANDS.keys() - {"throughput"}, COMMANDS))
def test_a_command_whose_reader_is_gone_ends_without_a_word(command: str) -> None:
    done = run_without_reader(*COMMANDS[command])
    assert done.stderr == ""
    assert done.returncode in _SIGPIPE_CODES


def test_a_reader_that_goes_in_the_middle_is_no_failure_of_the_server(tmp_path: Path) -> None:
    """`toka-ping | head`: the sentence of a server that cannot be reached would blame the wrong one."""
    program = (
        "import toka_engine.scripts.ping as ping\n"
        "def answer(config, connection):\n"
        "    while True: yield 'word ' * 1000\n"
        "ping.ask = answer\n"
        "ping.main()\n"
    )
    pipeline = f"{sys.executable} -c {shlex.quote(program)} | head -c 10"
    done = subprocess.run(["sh", "-c", pipeline], env=_ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("word word ", "")


@pytest.mark.parametrize("arguments", [["toka_engine", "port=x"], ["toka_engine.scripts.ping", "port=x"]])
def test_an_error_that_nobody_reads_ends_a_command_all_the_same(arguments: list[str]) -> None:
    assert run_without_reader(*arguments, reads="stdout").returncode in (2, *_SIGPIPE_CODES)


def test_the_operator_says_by_its_exit_code_what_nobody_reads() -> None:
    assert run_without_reader("toka_operator", reads="stdout").returncode == 2


def test_an_engine_whose_log_nobody_reads_serves_on_and_ends_with_the_code_that_it_would_have(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    words = tmp_path / "words"
    with contextlib.closing(hold_port()[0]) as held:
        arguments = (f"model={tmp_path / 'model'}", f"port={held.getsockname()[1]}", f"termination_log={words}")
        program = ("tests.unit.engine.standins.engine", "host=127.0.0.1", *arguments)
        done = run_without_reader(*program, reads="stdout", TOKA_TEST_MODEL="memory")
    assert done.returncode == ExitCode.OUT_OF_MEMORY
    assert words.read_text() == "OutOfMemory: model: 1 GB short"


def test_every_program_of_ours_goes_through_the_one_mechanism() -> None:
    """A module that is run must end by `run_command`, or serve: as a child, or by `run`."""
    for path in sorted((ROOT / "engine").rglob("*.py")):
        tree = ast.parse(path.read_text())
        guards = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        if not guards and path.name != "__main__.py":
            continue
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        # The converter imports nothing of ours, since an image's layer has it alone; it prints only how it is used.
        is_entry = path.parent.name == "toka_engine" and path.name in ("__main__.py", "entry.py", "convert_builtin.py")
        assert is_entry or {"run_command", "run_child", "run"} & called & imported, path.relative_to(ROOT)
