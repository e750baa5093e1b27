"""Structured output held to its promise: every answer that is not cut validates. A folder of JSON schemas, some seeds.

    python -m toka_engine.benchmarks.structured URL MODEL FOLDER [seeds=3] [max_tokens=192] [at_once=16]

FOLDER has one schema a file, as it is or under the key "schema" (guidance-ai/jsonschemabench has thousands). Each is
asked for with `strict: true` at temperature 1. The answers are validated by jsonschema, in the schema's own draft or
2020-12. Prints one JSON object, whose `invalid` must be empty.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from toka_engine.output import run_command

_TIMEOUT_S = 600
_MAX_SHOWN = 10


class Suite:
    """The requests of one run, and what came of them."""

    def __init__(self, url: str, model: str, max_tokens: int, at_once: int) -> None:
        self._url, self._model, self._max_tokens = f"{url.rstrip('/')}/v1/chat/completions", model, max_tokens
        self._room = asyncio.Semaphore(at_once)
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.invalid: list[dict[str, str]] = []
        self.num_tokens = 0

    async def ask(self, session: aiohttp.ClientSession, path: Path, schema: Any, seed: int) -> None:
        """Ask for one text of `schema`."""
        form = {"name": "answer", "schema": schema, "strict": True}
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": f"Give an example of: {schema.get('title') or path.stem}"}],
            "response_format": {"type": "json_schema", "json_schema": form},
            "temperature": 1.0,
            "seed": seed,
            "max_tokens": self._max_tokens,
        }
        async with self._room, session.post(self._url, json=body) as response:
            answer = await response.json()
        self._take(path, schema, response.status, answer)

    def _take(self, path: Path, schema: Any, status: int, answer: Any) -> None:
        if status != 200:
            self.counts[f"status {status}"] += 1
            self.refusals[answer["error"]["message"].partition(": ")[2][:80]] += 1
            return
        choice = answer["choices"][0]
        self.num_tokens += answer["usage"]["completion_tokens"]
        if choice["finish_reason"] != "stop":
            self.counts["cut"] += 1
            return
        self.counts["whole"] += 1
        text = choice["message"]["content"]
        if error := find_error(schema, text):
            self.invalid.append({"schema": path.name, "text": text, "error": error})


def find_error(schema: Any, text: str) -> str:
    """Return why `text` is no instance of `schema`; "" if it is one."""
    import jsonschema

    try:
        value = json.loads(text)
    except ValueError as error:
        return str(error)
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        validator(schema).validate(value)
    except jsonschema.ValidationError as error:
        return error.message
    return ""


async def run(url: str, model: str, folder: Path, seeds: int = 3, max_tokens: int = 192, at_once: int = 16) -> None:
    """Ask for every schema and print what came of it."""
    suite = Suite(url, model, max_tokens, at_once)
    schemas = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    began_s = time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
        calls = [
            suite.ask(session, path, schema.get("schema", schema), seed)
            for path, schema in schemas.items()
            for seed in range(seeds)
        ]
        await asyncio.gather(*calls)
    report = {
        "schemas": len(schemas),
        "seeds": seeds,
        **dict(suite.counts),
        "num_invalid": len(suite.invalid),
        "tokens_per_s": round(suite.num_tokens / (time.monotonic() - began_s), 1),
        "refusals": dict(suite.refusals.most_common(_MAX_SHOWN)),
        "invalid": suite.invalid[:_MAX_SHOWN],
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))


def main() -> int:
    """Run with the arguments of the command line."""
    positional = [argument for argument in sys.argv[1:] if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if len(positional) != 3 or not set(options) <= {"seeds", "max_tokens", "at_once"}:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    url, model, folder = positional
    asyncio.run(run(url, model, Path(folder), **{name: int(value) for name, value in options.items()}))
    return 0


if __name__ == "__main__":
    run_command(main)
