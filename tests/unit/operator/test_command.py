"""The command `toka-operator`: what it says, and to whom."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from toka_operator.main import HELP

from tests.engine_process import ROOT

VARIABLE = re.compile(r"TOKA_[A-Z_]+")


def run_operator(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOKA_")}
    environment["PYTHONPATH"] = str(ROOT / "operator")
    command = [sys.executable, "-m", "toka_operator", *arguments]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)


def test_the_help_names_every_variable_that_is_read() -> None:
    read = {*VARIABLE.findall((ROOT / "operator/toka_operator/settings.py").read_text())} - {"TOKA_"}
    assert {*VARIABLE.findall(HELP)} == read
    done = run_operator("--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, HELP, "")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_a_reader_that_is_gone_is_no_error(argument: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run_operator(argument, stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_argument_is_refused_and_not_passed_over() -> None:
    done = run_operator("--namespace=x")
    assert done.returncode == 2
    assert "unknown argument '--namespace=x'" in done.stderr
