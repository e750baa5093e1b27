"""The shell scripts: each is read by bash, and scripts/check needs for a check only what that check is about."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.engine_process import ROOT

SCRIPTS = [
    path
    for path in sorted([*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"])
    if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!/bin/bash"))
]


def run_check(*names: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "check"), *names],
        env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def without_helm(tmp_path: Path) -> dict[str, str]:
    """A machine on which scripts/setup has made no cluster's commands, and which has no helm of its own."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "grep", "cat", "cmp"):
        program = shutil.which(name)
        assert program is not None
        (tmp_path / "bin" / name).symlink_to(program)
    return {"TOKA_CACHE_DIR": str(tmp_path), "PATH": str(tmp_path / "bin")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_can_be_run(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False).returncode == 0
    assert script.suffix == ".sh" or os.access(script, os.X_OK)


def test_checks_that_are_not_about_charts_need_no_helm(without_helm: dict[str, str]) -> None:
    done = run_check("scripts", **without_helm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"bash -n {script.relative_to(ROOT)}\n" in done.stdout for script in SCRIPTS)


def test_the_charts_check_says_what_it_lacks_and_fails(without_helm: dict[str, str]) -> None:
    done = run_check("chart", **without_helm)
    assert done.returncode == 1
    assert "FAILED: chart: there is no helm; scripts/setup makes one" in done.stdout


def test_a_check_that_does_not_exist_is_refused_by_name() -> None:
    done = run_check("spelling")
    assert done.returncode == 1
    assert "unknown check spelling: code, documents, scripts or chart" in done.stderr
