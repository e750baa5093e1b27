"""Fuzzes the HTTP server by its own OpenAPI document: `python -m tests.clients.fuzz [SECONDS [URL]]`, 600 by default.

schemathesis, in an environment of its own, sends what the document allows and what it forbids. No answer may be a 5xx,
have a status or a body that the document does not name, or be of another type than it says. A run that ends early is
followed by another one with a new seed, which it prints. The server is the real process; a scripted manager stands for
the model, so that the time goes into requests. With a URL it is that of an engine which runs already.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from toka_engine.builtin import ensure_builtin

from tests.clients.environments import python_of
from tests.unit.server.harness import running_server, speak

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_IDS = [504, 3575, 282, 4649]
_SHORTEST_RUN_S = 30
_LEAST_TIMEOUT_S = 60
_ANSWER_S = 120
"""Time for one answer: a whole model on a CPU that others use, too, may need more than the usual ten seconds."""


def fuzz(url: str, seconds: int, folder: Path) -> int:
    """Run schemathesis again and again, each time with another seed; return the first exit code that is not 0."""
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        document = json.load(answer)
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    for schema in document["components"]["schemas"].values():
        _narrow(schema.get("properties", {}), model)
    path = folder / "openapi.json"
    path.write_text(json.dumps(document))
    program = python_of("schemathesis", Path(__file__).parent / "fuzz_pins.txt").parent / "st"
    options = ["--url", url, "--checks", _CHECKS, "--workers", "1", "--continue-on-failure"]
    options += ["--request-timeout", str(_ANSWER_S)]
    until_s = time.monotonic() + seconds
    code, num_runs = 0, 0
    while num_runs == 0 or (left_s := int(until_s - time.monotonic())) >= _SHORTEST_RUN_S:
        limits = ["--max-time", str(left_s if num_runs else seconds), "--seed", str(random.getrandbits(32))]
        code = subprocess.run([program, "run", path, *options, *limits], cwd=folder).returncode or code
        num_runs += 1
    print(f"schemathesis ran {num_runs} times")
    return code


def _narrow(fields: dict[str, Any], model: str) -> None:
    """Let requests name the model that is served: any other is a 404, behind which nothing is tested. Give them time:
    one that is not answered within its own `timeout_s` is a 504, as the document says.
    """
    if fields.get("model", {}).get("type") == "string":
        fields["model"] = {"type": "string", "enum": [model]}
    for kind in fields.get("timeout_s", {}).get("anyOf", ()):
        if kind.get("type") == "number":
            kind["minimum"] = _LEAST_TIMEOUT_S
            kind.pop("exclusiveMinimum", None)


def main() -> int:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if len(sys.argv) > 2:
            return fuzz(sys.argv[2].rstrip("/"), seconds, folder)
        data = folder / "data"
        data.mkdir()
        with running_server(ensure_builtin(), data_dir=str(data), access_log=False) as server:
            server.manager.on_submit = lambda submit: speak(server.manager, submit, _IDS)
            return fuzz(server.url, seconds, folder)


if __name__ == "__main__":
    sys.exit(main())
