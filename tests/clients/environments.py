"""Environments of the clients: each has its own, made from its pins and kept in the cache folder.

`python -m tests.clients.environments NAME...` makes them ahead of the tests; without a name, all. Pins that change make
a new environment. What cannot be made fails: no test is skipped for want of a client, nor of its language's tools.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from pathlib import Path

from tests.clients.languages import language_of

PINS = Path(__file__).parent / "pins"
CLIENTS = tuple(sorted(path.stem for path in PINS.iterdir()))


def pins_of(name: str) -> Path:
    folder = PINS / name
    return folder if folder.is_dir() else PINS / f"{name}.txt"


def environment_of(name: str, pins: Path | None = None) -> Path:
    """The folder of a client's environment, which is made if it is not there. `pins`: the client's by default."""
    pins = pins or pins_of(name)
    language = language_of(pins)
    language.check_tools(name)
    cache = Path(os.environ.get("TOKA_CACHE_DIR") or Path.home() / ".cache" / "toka") / "clients"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{name}-{_key(pins)}"
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            language.make(pins, folder)
            (folder / "made").touch()
    return folder


def python_of(name: str, pins: Path | None = None) -> Path:
    """The interpreter of a Python client's environment."""
    return environment_of(name, pins) / "bin" / "python"


def _key(pins: Path) -> str:
    files = [pins] if pins.is_file() else sorted(pins.iterdir())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return hashlib.sha256(version.encode() + b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


if __name__ == "__main__":
    for client in sys.argv[1:] or CLIENTS:
        print(client, environment_of(client), flush=True)
