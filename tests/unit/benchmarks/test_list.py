"""`python -m toka_engine.benchmarks` says what there is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from toka_engine.benchmarks.__main__ import NAMES

from tests.engine_process import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "engine")}
    command = [sys.executable, "-m", "toka_engine.benchmarks", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_every_benchmark_has_a_line_of_its_own() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all(len(line.split()) > 3 for line in lines), "a module without a sentence"
    assert max(map(len, lines)) <= 120
    assert all(importlib.util.find_spec(f"toka_engine.benchmarks.{name}") for name in NAMES)


def test_a_name_as_argument_is_answered_with_the_command() -> None:
    done = run("step")
    assert (done.returncode, done.stdout) == (2, "")
    assert "toka_engine.benchmarks.step" in done.stderr
