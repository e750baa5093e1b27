"""The shell scripts: each is read by bash, and scripts/check needs for a check only what that check is about."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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


FAKE_PYTHON = """#!/bin/bash
[ "$1" != -c ] || exec "$REAL_PYTHON" "$@"
echo "python $*"
echo "bytecode: ${PYTHONDONTWRITEBYTECODE:-kept} in ${PYTHONPYCACHEPREFIX:-the sources}"
case "$*" in
  *"pytest"*"--last-failed"*) exit "${AGAIN_STATUS:-0}" ;;
  *"pytest"*"${FAILING_TIER:-none fails}"*)
    cache=$(sed -n 's/.*cache_dir=\\([^ ]*\\).*/\\1/p' <<<"$*")
    [ -z "$cache" ] || { mkdir -p "$cache/v/cache"; echo "$FAILED_TESTS" >"$cache/v/cache/lastfailed"; }
    exit "${TIER_STATUS:-1}" ;;
  *"pytest"*"tests/cluster"*)
    until [ -e "$MEETING/${CLUSTER_AWAITS:-model}" ]; do sleep 0.05; done
    touch "$MEETING/cluster" ;;
  *"pytest"*"tests/model"*)
    touch "$MEETING/model"
    [ -n "${ALONE:-}" ] || until [ -e "$MEETING/${MODEL_AWAITS:-cluster}" ]; do sleep 0.05; done
    exit "${MODEL_STATUS:-0}" ;;
  *"pytest"*"tests/api"*) touch "$MEETING/api" ;;
esac
"""
"""An interpreter whose tiers model and cluster wait for each other, or for the tiers that are named, unless ALONE is
set. One tier may fail."""


def run_tests(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """scripts/test with FAKE_PYTHON."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    own = {"TOKA_VENV": str(folder / "venv"), "MEETING": str(folder), "REAL_PYTHON": sys.executable}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TOKA_TEST_")}
    environment = {**inherited, **own, **env}
    command = ["bash", str(ROOT / "scripts" / "test"), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


def results(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Tier and result, from the summary."""
    return [line.split()[:2] for line in done.stdout.partition("=== summary\n")[2].splitlines()[:-1]]


def test_tiers_that_wait_run_beside_those_that_compute_and_any_failure_is_told(tmp_path: Path) -> None:
    done = run_tests(tmp_path, MODEL_STATUS="1")
    tiers = ["unit", "model", "api", "cluster", "e2e"]
    assert results(done) == [[tier, "FAILED" if tier == "model" else "passed"] for tier in tiers]
    assert done.returncode == 1


@pytest.mark.parametrize("busy", ["model", "cluster"])
def test_the_half_that_is_through_first_runs_the_tier_that_either_may(tmp_path: Path, busy: str) -> None:
    awaits = {"MODEL_AWAITS": "model", "CLUSTER_AWAITS": "cluster", f"{busy.upper()}_AWAITS": "api"}
    (tmp_path / "cluster").touch()
    done = run_tests(tmp_path, **awaits)
    assert results(done) == [[tier, "passed"] for tier in ("unit", "model", "api", "cluster", "e2e")]
    assert done.stdout.count("=== api\n") == 1
    assert done.returncode == 0


def test_on_demand_all_tiers_run_one_after_the_other_with_what_is_handed_on(tmp_path: Path) -> None:
    done = run_tests(tmp_path, "model", "cluster", "--", "-k", "some", TOKA_TEST_SERIAL="1", ALONE="1")
    assert results(done) == [["model", "passed"], ["cluster", "passed"]]
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("python -m pytest")]
    assert [line.endswith(" -k some") for line in lines] == [True, True]
    assert "tests/model" in lines[0]


def test_bytecode_is_kept_within_the_environment_whatever_the_shell_says(tmp_path: Path) -> None:
    """Otherwise each of thousands of processes compiles all of its modules."""
    done = run_tests(tmp_path, "model", ALONE="1", PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX="/elsewhere")
    noted = {line for line in done.stdout.splitlines() if line.startswith("bytecode: ")}
    assert noted == {f"bytecode: kept in {tmp_path}/venv/bytecode"}


def fail_once(folder: Path, tier: str, num_failed: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    """One tier alone, some tests of which fail, as CI runs it."""
    failed = json.dumps({f"tests/{tier}/test_some.py::test_{number}": True for number in range(num_failed)})
    settings = {"TOKA_TEST_AGAIN": "2", "FAILING_TIER": f"tests/{tier}", "FAILED_TESTS": failed, **env}
    return run_tests(folder, tier, **settings)


def test_in_ci_what_failed_beside_other_tests_and_passes_alone_is_named_as_unsteady(tmp_path: Path) -> None:
    done = fail_once(tmp_path, "e2e", 2)
    assert results(done) == [["e2e", "unsteady"]]
    assert done.returncode == 0
    assert "=== unsteady: failed beside other tests and passed alone\ntests/e2e/test_some.py::test_0\n" in done.stdout


@pytest.mark.parametrize(
    ("tier", "env"),
    [
        ("e2e", {"AGAIN_STATUS": "1"}),
        ("e2e", {"TIER_STATUS": "2"}),
        ("e2e", {"TOKA_TEST_AGAIN": "1"}),
        ("e2e", {"TOKA_TEST_AGAIN": ""}),
        ("unit", {}),
    ],
    ids=["it fails again", "tests were not even collected", "more fail than may", "nobody asked", "no real processes"],
)
def test_a_tier_fails_all_the_same_if(tmp_path: Path, tier: str, env: dict[str, str]) -> None:
    done = fail_once(tmp_path, tier, 2, **env)
    assert results(done) == [[tier, "FAILED"]]
    assert done.returncode == 1
    assert "unsteady" not in done.stdout


def test_a_tier_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    done = run_tests(tmp_path, "unti")
    assert done.returncode == 1
    assert "unknown tier unti" in done.stderr
