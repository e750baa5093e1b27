"""scripts/check_names.py: names in backticks that nothing defines are found, where they stand, and no others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.engine_process import ROOT


@pytest.fixture
def checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_names", ROOT / "scripts" / "check_names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def undefined(checker: ModuleType, **files: str) -> list[str]:
    paths = []
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        path = checker.ROOT / f"{stem}.{suffix}"
        path.write_text(text)
        paths.append(path)
    return list(checker.find_undefined(paths))


CODE = '''"""Uses `Ghost` and `Thing`.

And `absent_name()`."""
import asyncio
LIMIT = 3
"""Unlike `LIMITS`."""
class Thing:
    """Has `size`, not `width`."""
    size: int = 0
    def grow(self, by): return asyncio.sleep(by)  # see `Thing.grow`, `Thing.shrink` and `asyncio.sleep`
'''


def test_docstrings_and_comments_are_read_and_each_place_is_named(checker: ModuleType) -> None:
    assert undefined(checker, part_py=CODE) == [
        "part.py:1: Ghost",
        "part.py:3: absent_name",
        "part.py:6: LIMITS",
        "part.py:8: width",
        "part.py:10: Thing.shrink",
    ]


def test_documents_are_read_but_for_their_examples(checker: ModuleType) -> None:
    page = "`Thing`, `Nothing`, `part.py`, `part.Thing`, `part.Other`\n\n```\nshown = `x`\n```\n\n`shown` `lost`"
    assert undefined(checker, part_py="class Thing: pass", page_md=page) == [
        "page.md:1: Nothing",
        "page.md:1: part.Other",
        "page.md:7: lost",
    ]


def test_fields_of_a_resource_and_names_of_metrics_count(checker: ModuleType) -> None:
    (checker.ROOT / "crds").mkdir()
    crd = checker.ROOT / "crds" / "things.yaml"
    crd.write_text(
        "spec:\n  properties:\n    rollout:\n      properties:\n        maxSurge: {}\n    other:\n      deep: {}\n"
    )
    page = checker.ROOT / "page.md"
    page.write_text("`rollout.maxSurge` `rollout.deep` `toka_maxSurge` `toka_none`")
    assert checker.find_undefined([crd, page]) == ["page.md:1: rollout.deep", "page.md:1: toka_none"]
