"""The progress of scripts/quickstart: one line that changes on a terminal, few lines in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess

from tests.engine_process import ROOT

_PROGRAM = """
. scripts/lib.sh; . scripts/progress.sh
log={log}
step "first" bash -c 'for word in one two three; do echo $word; sleep 0.5; done'
step "second" {second}
echo done
"""
LONG = "x" * 300


def run_in_a_pipe(log: object, second: str = "true", **env: str) -> tuple[int, str]:
    program = _PROGRAM.format(log=log, second=second)
    done = subprocess.run(
        ["bash", "-c", program, f"{ROOT}/scripts/quickstart"], cwd=ROOT, env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout


def run_on_a_terminal(log: object, second: str = "true") -> str:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", "-c", f"stty cols 100; {_PROGRAM.format(log=log, second=second)}", f"{ROOT}/scripts/quickstart"],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
    ):  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    return shown.decode()


def test_a_log_gets_a_steps_begin_and_end_and_nothing_each_ten_seconds(tmp_path) -> None:
    code, text = run_in_a_pipe(tmp_path / "log")
    assert code == 0
    assert re.fullmatch(r"first \.\.\.\nfirst +\d s\nsecond \.\.\.\nsecond +\d s\ndone\n", text)


def test_a_log_gets_a_line_of_progress_each_time_that_the_period_is_over(tmp_path) -> None:
    _, text = run_in_a_pipe(tmp_path / "log", TOKA_REPORT_SECONDS="1")
    assert re.search(r"^      [12] s  (one|two|three)$", text, re.MULTILINE)
    assert "REPORT_S=${TOKA_REPORT_SECONDS:-60}" in (ROOT / "scripts/progress.sh").read_text()


def test_on_a_terminal_a_step_is_one_line_that_changes_and_never_wraps(tmp_path) -> None:
    shown = run_on_a_terminal(tmp_path / "log", f"bash -c 'echo {LONG}; sleep 0.5'")

    ends = [line.rpartition("\r\x1b[K")[2] for line in shown.split("\r\n")]
    assert [re.sub(r" +\d+ s$", "", line) for line in ends] == ["first", "second", "done", ""]

    drawn = [part for part in re.split(r"\r\x1b\[K|\r\n", shown) if part]
    assert any("two" in part for part in drawn)
    assert any("xxx" in part for part in drawn)
    assert max(map(len, drawn)) < 100


def test_a_step_that_fails_ends_the_script_and_shows_the_end_of_its_output(tmp_path) -> None:
    code, text = run_in_a_pipe(tmp_path / "log", "bash -c 'echo the cause; exit 3'")
    assert code == 1
    assert re.search(r"failed after \d s:\nthe cause\n$", text)
    assert "done" not in text
