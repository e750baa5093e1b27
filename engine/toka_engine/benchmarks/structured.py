"""Structured output held to its promise: every answer that is not cut validates. A folder of JSON schemas, some seeds.

    python -m toka_engine.benchmarks.structured URL MODEL FOLDER [schemas=300] [seeds=3] [max_tokens=192] [at_once=16]

FOLDER has one schema a file, as it is or under the key "schema" (maskbench/data of guidance-ai/jsonschemabench has
thousands); `schemas` of them are drawn, always the same ones. Each is asked for with `strict: true` at temperature 1.
The answers are validated by jsonschema, formats included, in the schema's own draft or 2020-12. Prints one JSON object.
The exit code is 1 where an answer that was not cut does not validate, or one has a status of 5xx.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from toka_engine.output import run_command

_TIMEOUT_S = 7200
_MAX_SHOWN = 10
_DRAW_SEED = 1
_PROGRESS_EVERY = 50
_BUSY_S = 0.5
"""The pause before a request is repeated that found the checker of grammars busy."""


class Suite:
    """The requests of one run, and what came of them."""

    def __init__(self, url: str, model: str, max_tokens: int, at_once: int) -> None:
        self._url, self._model, self._max_tokens = f"{url.rstrip('/')}/v1/chat/completions", model, max_tokens
        self._room = asyncio.Semaphore(at_once)
        self.counts: Counter[str] = Counter()
        self.refusals: dict[str, str] = {}
        """Why a schema was refused, by its name."""
        self.invalid: list[dict[str, str]] = []
        self.num_tokens = 0
        self._num_taken = 0

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
        async with self._room:
            status, answer = await self._post(session, body)
            while status == 429:
                self.counts["asked again"] += 1
                await asyncio.sleep(_BUSY_S)
                status, answer = await self._post(session, body)
        self._take(path, schema, status, answer)
        self._num_taken += 1
        if self._num_taken % _PROGRESS_EVERY == 0:
            print(self._num_taken, dict(self.counts), f"invalid: {len(self.invalid)}", file=sys.stderr, flush=True)

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[int, Any]:
        async with session.post(self._url, json=body) as response:
            return response.status, await response.json()

    @property
    def is_well(self) -> bool:
        return not self.invalid and not any(name.startswith("status 5") for name in self.counts)

    def _take(self, path: Path, schema: Any, status: int, answer: Any) -> None:
        if status != 200:
            self.counts[f"status {status} {answer['error'].get('code')}"] += 1
            self.refusals[path.name] = answer["error"]["message"].partition(": ")[2][:80]
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
        validator(schema, format_checker=validator.FORMAT_CHECKER).validate(value)
    except jsonschema.ValidationError as error:
        return error.message
    return ""


async def run(
    url: str,
    model: str,
    folder: Path,
    *,
    schemas: int = 300,
    seeds: int = 3,
    max_tokens: int = 192,
    at_once: int = 16,
) -> bool:
    """Ask for every drawn schema, print what came of it, and return whether all was well."""
    suite = Suite(url, model, max_tokens, at_once)
    drawn = draw(sorted(folder.glob("*.json")), schemas)
    began_s = time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
        calls = [suite.ask(session, path, schema, seed) for path, schema in drawn.items() for seed in range(seeds)]
        await asyncio.gather(*calls)
    report = {
        "schemas": len(drawn),
        "seeds": seeds,
        **dict(suite.counts),
        "schemas_refused": len(suite.refusals),
        "num_invalid": len(suite.invalid),
        "tokens": suite.num_tokens,
        "seconds": round(time.monotonic() - began_s),
        "refusals": dict(Counter(suite.refusals.values()).most_common(_MAX_SHOWN)),
        "invalid": suite.invalid[:_MAX_SHOWN],
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))
    return suite.is_well


def draw(paths: list[Path], count: int) -> dict[Path, Any]:
    """Return `count` of the schemas, or all if there are no more; always the same ones of the same files."""
    chosen = paths if len(paths) <= count else random.Random(_DRAW_SEED).sample(paths, count)
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in chosen}
    return {path: found.get("schema", found) for path, found in read.items()}


def main() -> int:
    """Run with the arguments of the command line."""
    positional = [argument for argument in sys.argv[1:] if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if len(positional) != 3 or not set(options) <= {"schemas", "seeds", "max_tokens", "at_once"}:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    url, model, folder = positional
    counts = {name: int(value) for name, value in options.items()}
    return 0 if asyncio.run(run(url, model, Path(folder), **counts)) else 1


if __name__ == "__main__":
    run_command(main)
