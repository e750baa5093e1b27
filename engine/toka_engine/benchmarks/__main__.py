"""`python -m toka_engine.benchmarks` lists the benchmarks, one line each. Loads none of them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from toka_engine.output import run_command

NAMES = ("throughput", "cpu", "step", "hydragen", "manager", "api", "structured", "soak", "machine", "plot")


def describe(name: str) -> str:
    """The first sentence of a benchmark's docstring."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    return lines[0].partition(". ")[0].rstrip(".") if lines else ""


def main() -> int:
    if len(sys.argv) > 1:
        print(f"the benchmarks are modules: python -m toka_engine.benchmarks.{sys.argv[1]} ...", file=sys.stderr)
        return 2
    print("python -m toka_engine.benchmarks.NAME ..., --help or the module's docstring says how. NAME is one of:")
    width = max(map(len, NAMES))
    for name in NAMES:
        print(f"  {name:{width}}  {describe(name)}")
    return 0


if __name__ == "__main__":
    run_command(main)
