"""The scripts of examples/, run as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.engine_process import ROOT, EngineProcess


def run_example(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "engine"), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_many_samples_of_one_question_are_counted(engine: EngineProcess) -> None:
    printed = run_example("sample_many.py", f"{engine.url}/v1", "32")
    counts = [int(count) for count in re.findall(r"^ +(\d+)  ['\"]", printed, re.MULTILINE)]
    assert 1 <= len(counts) <= 10
    assert re.search(r"^32 samples, \d+ different ones$", printed, re.MULTILINE)
    assert sum(counts) <= 32


def test_the_script_without_a_server_samples_chats_and_streams(model_dir: Path) -> None:
    printed = run_example("llm_offline.py", str(model_dir))
    assert len(re.findall(r"^  [0-3]: ['\"]", printed, re.MULTILINE)) == 8
    assert re.search(r"^What is the capital of France\?\n  .*Paris", printed, re.MULTILINE)
    assert re.search(r"^A stream: The sea is .+$", printed, re.MULTILINE)


def test_a_file_of_questions_is_answered_as_a_batch(engine: EngineProcess) -> None:
    printed = run_example("run_batch.py", f"{engine.url}/v1")
    assert re.search(r"completed, 4 of 4 answered$", printed, re.MULTILINE)
    assert re.search(r"^What is the capital of France\?  .*Paris", printed, re.MULTILINE)
