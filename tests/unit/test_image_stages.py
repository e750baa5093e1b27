"""An image's stages have all the modules that their commands import."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.fault.image import ROOT, copy_stage, run


def test_the_stage_that_builds_flashinfers_kernels_has_what_its_command_imports(tmp_path: Path) -> None:
    """It copies single files, so that no other change compiles these kernels again."""
    copy_stage("engine-kernels", tmp_path)
    done = run("-m", "toka_engine.model.aot", "--help", source=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_stage_that_converts_the_builtin_model_needs_one_file_of_ours(tmp_path: Path) -> None:
    copy_stage("engine-kernels", tmp_path)  # what keeps the checkout out of reach
    program = tmp_path / "convert_builtin.py"
    shutil.copy(ROOT / "engine/toka_engine/convert_builtin.py", program)
    for path in tmp_path.glob("toka_engine"):
        shutil.rmtree(path)
    done = run(str(program), source=tmp_path)
    assert done.returncode == os.EX_USAGE, done.stderr
