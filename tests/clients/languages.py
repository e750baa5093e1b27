"""The languages that clients are written in: who makes an environment of a client's pins, and who runs its scripts.

The pins of a Python client are a file; those of another are a folder with the lock files of its language's own tool.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_MAKE_TIMEOUT_S = 1800
"""Go compiles its client, which takes minutes on a machine that does other work as well."""
_COPY_DEPENDENCIES = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"


class MissingToolError(Exception):
    """A client's language needs a command that this machine does not have."""


@dataclass(frozen=True)
class Language:
    """Everything that differs between languages."""

    pins_file: str
    """The file of a pins folder that tells its language."""
    suffix: str
    tools: tuple[str, ...]
    source: str
    """A sentence's end: where the tools come from."""
    make: Callable[[Path, Path], None]
    """Fills an environment (second folder) from pins (first)."""
    command: Callable[[Path, Path], list[str | Path]]
    """Arguments that run a script in its own folder, given the environment."""

    def check_tools(self, client: str) -> None:
        missing = [tool for tool in self.tools if shutil.which(tool) is None]
        if missing:
            raise MissingToolError(f"The client {client} needs {' and '.join(missing)} on PATH: {self.source}.")


def _make_python(pins: Path, folder: Path) -> None:
    """Make a virtual environment. The pins name every package, so that nothing is resolved."""
    uv = _find_uv()
    python = folder / "bin" / "python"
    if uv is None:
        _run([sys.executable, "-m", "venv", folder])
        _run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", pins])
    else:
        _run([uv, "venv", "--quiet", "--python", sys.executable, folder])
        _run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, "--requirement", pins])


def _find_uv() -> str | None:
    cache = Path(os.environ.get("TOKA_CACHE_DIR") or Path.home() / ".cache" / "toka")
    kept = cache / "uv" / "bin" / "uv"
    return shutil.which("uv") or (str(kept) if kept.is_file() else None)


def _python_command(environment: Path, script: Path) -> list[str | Path]:
    """A command line's snippet is a shell script, which finds the client's commands on PATH."""
    if script.suffix == ".sh":
        path = f"PATH={environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return ["/usr/bin/env", path, "bash", "-eu", script]
    return [environment / "bin" / "python", script]


def _make_node(pins: Path, folder: Path) -> None:
    _copy(pins, folder)
    _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder)


def _node_command(environment: Path, script: Path) -> list[str | Path]:
    """Node looks for packages beside the script."""
    (script.parent / "node_modules").symlink_to(environment / "node_modules")
    return ["node", script]


def _make_go(pins: Path, folder: Path) -> None:
    """Compile what the pins import, so that a script's own compilation takes seconds."""
    _copy(pins, folder)
    _run(["go", "build", "-mod=readonly", "-o", os.devnull, "."], folder)


def _go_command(environment: Path, script: Path) -> list[str | Path]:
    for name in ("go.mod", "go.sum"):
        shutil.copy(environment / name, script.parent)
    return ["go", "run", "-mod=readonly", script]


def _make_java(pins: Path, folder: Path) -> None:
    _copy(pins, folder)
    options = ["-DincludeScope=runtime", "-DoutputDirectory=lib"]
    _run(["mvn", "--quiet", "--batch-mode", _COPY_DEPENDENCIES, *options], folder)


def _java_command(environment: Path, script: Path) -> list[str | Path]:
    return ["java", "-cp", f"{environment / 'lib'}/*", script]


def _copy(pins: Path, folder: Path) -> None:
    shutil.copytree(pins, folder, dirs_exist_ok=True)


def _run(command: list[str | Path], folder: Path | None = None) -> None:
    subprocess.run(command, cwd=folder, check=True, timeout=_MAKE_TIMEOUT_S, stdin=subprocess.DEVNULL)


PYTHON = Language("", ".py", (), "", _make_python, _python_command)
_OTHERS = (
    Language(
        "package.json",
        ".mjs",
        ("node", "npm"),
        "Node.js 18 or newer, in Debian nodejs and npm",
        _make_node,
        _node_command,
    ),
    Language("go.mod", ".go", ("go",), "Go as new as its go.mod says", _make_go, _go_command),
    Language(
        "pom.xml",
        ".java",
        ("java", "mvn"),
        "a JDK from 17 and Maven, in Debian default-jdk-headless and maven",
        _make_java,
        _java_command,
    ),
)


def language_of(pins: Path) -> Language:
    """The language of a client, by its pins."""
    if pins.is_file():
        return PYTHON
    return next(language for language in _OTHERS if (pins / language.pins_file).is_file())
