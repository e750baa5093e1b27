"""An image's stages have all the modules that their commands import."""

from __future__ import annotations

from pathlib import Path

from tests.fault.image import copy_stage, run


def test_the_stage_that_builds_flashinfers_kernels_has_what_its_command_imports(tmp_path: Path) -> None:
    """It copies single files, so that no other change compiles these kernels again."""
    copy_stage("engine-kernels", tmp_path)
    done = run("-m", "toka_engine.model.aot", "--help", source=tmp_path)
    assert done.returncode == 0, done.stderr
