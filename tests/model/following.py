"""Follows a document of docs/ on a copy of the tree: its blocks are applied as a developer would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.engine_process import ROOT

_FILES = ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/engine_process.py", "tests/marks.py")


def blocks_of(document: str, language: str) -> list[str]:
    """The blocks in `language` of docs/`document`."""
    text = (ROOT / "docs" / document).read_text()
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"the document has no {language} block"
    return found


def copy_tree(tree: Path, *folders: str) -> None:
    """Copy what a developer changes: `folders`, and the files that every test needs."""
    leave_out = shutil.ignore_patterns("__pycache__")
    for folder in folders:
        shutil.copytree(ROOT / folder, tree / folder, ignore=leave_out)
    for name in _FILES:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)


def apply_diffs(document: str, tree: Path) -> list[str]:
    """Apply the document's diffs; return the paths that they change."""
    changed: list[str] = []
    for block in blocks_of(document, "diff"):
        subprocess.run(["git", "apply", "--recount", "-"], cwd=tree, input=block, text=True, check=True)
        changed += re.findall(r"^\+\+\+ b/(\S+)$", block, re.MULTILINE)
    return changed


def run_tests(tree: Path, keyword: str, *files: str) -> str:
    """Run the tree's tests whose names have `keyword`, all of which must pass; return what pytest printed."""
    command = [sys.executable, "-m", "pytest", *files, "-k", keyword, "-v"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout
