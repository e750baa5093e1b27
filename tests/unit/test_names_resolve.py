"""Imports of our own modules resolve, also where CI runs nothing: in tests/gpu, documents and text that tests run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = (ROOT / "engine", ROOT / "operator", ROOT)
IMPORT = re.compile(
    r"^[+ ]*from ((?:toka_engine|toka_operator|tests)[\w.]*) import (?:\(([^)]*)\)|([^(#\n]+))", re.MULTILINE
)
PATH = re.compile(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|sh))`")
HOMES = [
    ROOT,
    *(ROOT / home for home in ("engine", "engine/toka_engine", "operator", "operator/toka_operator", "tests")),
]
READERS = sorted(
    path
    for pattern in ("docs/*.md", "README.md", "CONTRIBUTING.md", "examples/**/*.py", "tests/**/*.py", "engine/**/*.py")
    for path in ROOT.glob(pattern)
)


def find_module(name: str) -> Path | None:
    """The file of a module, or the folder of a package."""
    for root in SOURCE_ROOTS:
        path = root.joinpath(*name.split("."))
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if path.is_dir():
            return path
    return None


@cache
def names_in(module: Path) -> frozenset[str]:
    """Everything that `from module import ...` may name."""
    source = module / "__init__.py" if module.is_dir() else module
    names = {path.stem for path in module.iterdir()} if module.is_dir() else set()
    if source.is_file():
        names |= set(defined_in(ast.parse(source.read_text()).body))
    return frozenset(names)


def defined_in(statements: list[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Assign():
                for target in statement.targets:
                    yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name for alias in statement.names)
            case ast.If() | ast.Try() | ast.With():
                yield from defined_in([node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.stmt)])


def find_missing(path: Path) -> Iterator[str]:
    for module, several, one in IMPORT.findall(path.read_text()):
        found = find_module(module)
        for entry in re.sub(r"#[^\n]*", "", several or one).split(","):
            name = re.split(r"\s+as\s+", entry.strip("+ \n\t"))[0]
            if name and (found is None or name not in names_in(found)):
                yield f"from {module} import {name}"


def test_what_is_imported_from_our_modules_is_there() -> None:
    missing = {str(path.relative_to(ROOT)): list(find_missing(path)) for path in READERS}
    # Models that the reader of this page adds; `test_adding_a_model.py` follows it.
    added = [f"from toka_engine.model.architectures.{name} import" for name in ("gemma", "mistral")]
    page = missing.pop("docs/adding-a-model.md")
    assert [line for line in page if not line.startswith(tuple(added))] == []
    assert {path: lines for path, lines in missing.items() if lines} == {}


def test_documents_name_only_files_that_there_are() -> None:
    named = {(path.name, name) for path in ROOT.glob("docs/*.md") for name in PATH.findall(path.read_text())}
    missing = [each for each in named if not any((home / each[1]).exists() for home in HOMES)]
    assert sorted(each for each in missing if not each[1].startswith("tokasaurus/")) == []
