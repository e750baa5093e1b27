"""Environments of the clients: each has its own, made from its file under pins/ and kept in the cache folder.

`python -m tests.clients.environments NAME...` makes them ahead of the tests; without a name, all. A file that changes
makes a new environment. What cannot be made fails: no test is skipped for want of a client.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

_PINS = Path(__file__).parent / "pins"
_MAKE_TIMEOUT_S = 600
CLIENTS = tuple(sorted(path.stem for path in _PINS.glob("*.txt")))


def python_of(name: str, pins: Path | None = None) -> Path:
    """The interpreter of a client's environment, which is made if it is not there. `pins`: the client's by default."""
    pins = pins or _PINS / f"{name}.txt"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(version.encode() + pins.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("TOKA_CACHE_DIR") or Path.home() / ".cache" / "toka") / "clients"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{name}-{key}"
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, pins)
            (folder / "made").touch()
    return folder / "bin" / "python"


def _make(folder: Path, pins: Path) -> None:
    """Make an environment. The file names every package, so that nothing is resolved."""
    uv = _find_uv()
    python = folder / "bin" / "python"
    if uv is None:
        commands = [
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(pins)],
        ]
    else:
        commands = [
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), "--requirement", str(pins)],
        ]
    for command in commands:
        subprocess.run(command, check=True, timeout=_MAKE_TIMEOUT_S)


def _find_uv() -> str | None:
    cache = Path(os.environ.get("TOKA_CACHE_DIR") or Path.home() / ".cache" / "toka")
    kept = cache / "uv" / "bin" / "uv"
    return shutil.which("uv") or (str(kept) if kept.is_file() else None)


if __name__ == "__main__":
    for client in sys.argv[1:] or CLIENTS:
        print(client, python_of(client), flush=True)
