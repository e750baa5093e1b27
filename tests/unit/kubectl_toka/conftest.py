"""A cluster that answers what a test says, in place of kubectl."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

STUB = Path(__file__).with_name("stub.py")


@dataclass
class World:
    """The answers of the stand-in for kubectl."""

    folder: Path
    answers: dict[str, Any] = field(default_factory=dict)
    """Part of a command line -> its output, or an object."""
    port: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """Write the answers down; return the variable that names the stand-in."""
        texts = {k: v if isinstance(v, str) or v is None else json.dumps(v) for k, v in self.answers.items()}
        world = {"answers": texts, "port": self.port, "log": str(self.folder / "calls")}
        (self.folder / "world.json").write_text(json.dumps(world))
        return {"KUBECTL": f"{sys.executable} {STUB} {self.folder / 'world.json'}"}

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)
