"""Fuzzes the HTTP server by its own OpenAPI document: `python -m tests.clients.fuzz [SECONDS]`, 600 by default.

schemathesis, in an environment of its own, sends what the document allows and what it forbids. No answer may be a 5xx,
have a status or a body that the document does not name, or be of another type than it says. The server is the real
process; a scripted manager stands for the model, so that the time goes into requests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from toka_engine.builtin import ensure_builtin

from tests.clients.environments import python_of
from tests.unit.server.harness import MODEL, RunningServer, running_server, speak

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_IDS = [504, 3575, 282, 4649]


def fuzz(server: RunningServer, seconds: int, folder: Path) -> int:
    """Return schemathesis's exit code."""
    server.manager.on_submit = lambda submit: speak(server.manager, submit, _IDS)
    with urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
        document = json.load(answer)
    for schema in document["components"]["schemas"].values():
        _name_model(schema.get("properties", {}))
    path = folder / "openapi.json"
    path.write_text(json.dumps(document))
    program = python_of("schemathesis", Path(__file__).parent / "fuzz_pins.txt").parent / "st"
    command = [
        program,
        "run",
        path,
        "--url",
        server.url,
        "--max-time",
        str(seconds),
        "--checks",
        _CHECKS,
        "--workers",
        "1",
    ]
    return subprocess.run([*command, "--continue-on-failure"], cwd=folder).returncode


def _name_model(fields: dict[str, Any]) -> None:
    """Let requests name the model that is served: any other is a 404, behind which nothing is tested."""
    if fields.get("model", {}).get("type") == "string":
        fields["model"] = {"type": "string", "enum": [MODEL]}


def main() -> int:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        data.mkdir()
        with running_server(ensure_builtin(), data_dir=str(data), access_log=False) as server:
            return fuzz(server, seconds, folder)


if __name__ == "__main__":
    sys.exit(main())
