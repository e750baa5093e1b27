"""Fails on a name in backticks that is defined nowhere: in a docstring, a comment or a document.

python scripts/check_names.py    prints FILE:LINE and the name, and ends with 1 if there is one

A name is what an identifier looks like, dots included: `Sampling`, `manager.core`, `plan.Plan`, `max_tokens`. It counts
as defined if code, a manifest, a script or the name of a file has it. Of a dotted name whose first part is a module, a
class or a field of the CRD, the next part must be defined there. What others define (`torch.compile`, `SIGTERM`) counts
if our code uses it.
"""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTERNAL = {"Expect", "Upgrade"}
"""Names of others that no code of ours writes in this form: headers of HTTP."""
ABOUT_OTHERS = ("docs/coming-from-tokasaurus.md", "CHANGELOG.md")
"""Documents that name what another program, or an earlier version, defines."""
METRIC_PREFIX = "toka_"
QUOTED = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(\))?`(?!`)")
WORD = re.compile(r"[A-Za-z_]\w*")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PLAIN = (".yaml", ".yml", ".tpl", ".txt", ".toml", ".json", ".go", ".cu", ".proto", ".ini", ".cfg")


class Definitions:
    """Every name that something defines, and the members of each module and class of ours."""

    def __init__(self) -> None:
        self.names = set(keyword.kwlist)
        self.files: set[str] = set()
        self.members: dict[str, set[str]] = defaultdict(set)

    def add_python(self, path: Path, tree: ast.Module) -> None:
        docstrings = {id(node) for node, _ in _docstrings(tree)}
        self.members[_module_name(path)] |= _members(tree) | {each.stem for each in _siblings(path)}
        for node in ast.walk(tree):
            self.names |= _names_of(node, docstrings)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.files.add(node.value)
            if isinstance(node, ast.ClassDef):
                self.members[node.name] |= _members(node)

    def add_resource(self, text: str) -> None:
        """Take in a CRD or a chart's values: each field's own fields are its members."""
        owners: list[tuple[int, str]] = []
        for indent, name in re.findall(r"^( *)(\w+):", text, re.MULTILINE):
            while owners and owners[-1][0] >= len(indent):
                owners.pop()
            for _, owner in owners:
                self.members[owner].add(name)
            owners.append((len(indent), name))

    def add_text(self, text: str) -> None:
        self.names |= set(WORD.findall(text))

    def lacks(self, dotted: str) -> bool:
        """Whether `dotted` is defined nowhere."""
        name = dotted.removeprefix(METRIC_PREFIX)
        if dotted in EXTERNAL or name in self.names or dotted in self.files:
            return False
        parts = dotted.split(".")
        if any(part not in self.names for part in parts):
            return True
        for owner, member in itertools.pairwise(parts):
            if owner in self.members and member not in self.members[owner]:
                return True
        return False


def _docstrings(tree: ast.AST) -> Iterator[tuple[ast.Constant, int]]:
    """Strings that stand alone: docstrings, of constants and fields too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value, node.lineno


def _module_name(path: Path) -> str:
    return path.parent.name if path.stem in ("__init__", "__main__") else path.stem


def _siblings(path: Path) -> list[Path]:
    return list(path.parent.iterdir()) if path.stem == "__init__" else []


def _members(tree: ast.Module | ast.ClassDef) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.alias(asname=str(name)):
                found.add(name)
            case ast.alias(name=name):
                found.add(name.rpartition(".")[2])
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Constant(value=str(text)) if WORD.fullmatch(text):
                found.add(text)
    return found


def _names_of(node: ast.AST, docstrings: set[int]) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
            return {name}
        case ast.alias(name=name, asname=other):
            return {*name.split("."), other or ""}
        case ast.Constant(value=str(text)) if id(node) not in docstrings:
            return set(WORD.findall(text))
    return set()


def find_undefined(paths: list[Path]) -> list[str]:
    """Return FILE:LINE: NAME for every name in backticks that nothing in `paths` defines."""
    definitions = Definitions()
    texts: list[tuple[Path, int, str]] = []
    for path in paths:
        definitions.add_text(str(path.relative_to(ROOT)))
        definitions.files.add(path.name)
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        if path.suffix == ".py":
            tree = ast.parse(source)
            definitions.add_python(path, tree)
            texts += [(path, line, str(node.value)) for node, line in _docstrings(tree)]
            comments = tokenize.generate_tokens(io.StringIO(source).readline)
            texts += [(path, each.start[0], each.string) for each in comments if each.type == tokenize.COMMENT]
        elif path.suffix == ".md" and str(path.relative_to(ROOT)) not in ABOUT_OTHERS:
            definitions.add_text("\n".join(FENCE.findall(source)))
            blank = FENCE.sub(lambda found: "\n" * found[0].count("\n"), source)
            texts += [(path, number, line) for number, line in enumerate(blank.splitlines(), 1)]
        elif path.suffix in PLAIN or not path.suffix:
            definitions.add_text(source)
            if path.parent.name == "crds" or path.name == "values.yaml":
                definitions.add_resource(source)
    return [
        f"{path.relative_to(ROOT)}:{line + text.count(chr(10), 0, found.start())}: {found[1]}"
        for path, line, text in texts
        for found in QUOTED.finditer(text)
        if definitions.lacks(found[1])
    ]


def main() -> int:
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = find_undefined([ROOT / name for name in listed.stdout.splitlines()])
    print("\n".join(found) or "every name in backticks is defined")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
