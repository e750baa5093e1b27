#!/usr/bin/env python3
"""Writes the field tables of docs/api.md, made from the structs and ranges that feed /openapi.json, between two marks.

With `--print` the whole page goes to standard output instead. A test compares the two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "engine"))

from toka_engine.server.chat_plan import ChatRequest  # noqa: E402  (the engine need not be installed)
from toka_engine.server.endpoints.completions import CompletionRequest  # noqa: E402
from toka_engine.server.endpoints.tokenize import DetokenizeRequest, TokenizeRequest  # noqa: E402
from toka_engine.server.fields import HINTS, LACKING  # noqa: E402
from toka_engine.server.request import GenerationRequest, StreamOptions  # noqa: E402

Json = dict[str, Any]
PAGE = ROOT / "docs" / "api.md"
BEGIN = "<!-- begin: written by scripts/api_docs.py -->\n"
END = "<!-- end: written by scripts/api_docs.py -->\n"
_TABLES: tuple[tuple[str, type[msgspec.Struct], type[msgspec.Struct] | None], ...] = (
    ("Completions and chat", GenerationRequest, None),
    ("`/v1/completions` beside these", CompletionRequest, GenerationRequest),
    ("`/v1/chat/completions` beside these", ChatRequest, GenerationRequest),
    ("`stream_options`", StreamOptions, None),
    ("`/tokenize`", TokenizeRequest, None),
    ("`/detokenize`", DetokenizeRequest, None),
)
"""A title, the struct of a body, and the struct whose fields stand in a table of their own."""


def render() -> str:
    """Return the tables, as they stand between the marks."""
    lines: list[str] = []
    for title, struct, base in _TABLES:
        left_out = {*HINTS, "verbosity", *(base.__struct_fields__ if base else ())}
        schema = msgspec.json.schema(struct)
        properties: Json = schema["$defs"][struct.__name__]["properties"]
        required = schema["$defs"][struct.__name__].get("required", [])
        lines += [f"### {title}", "| field | value | |", "|---|---|---|"]
        for name, field in properties.items():
            if name not in left_out:
                lines.append(_row(name, field, required))
        lines.append("")
    lines += ["### Hints", ", ".join(f"`{name}`" for name in HINTS) + ": taken, and named in `x-toka-ignored`.", ""]
    lines += ["### Refused", "| field | unless it is | |", "|---|---|---|"]
    for name, lacking in LACKING.items():
        values = " or ".join(f"`{msgspec.json.encode(value).decode()}`" for value in lacking.neutral[:2])
        lines.append(f"| `{name}` | {values} | {lacking.what} |")
    return "\n".join([*lines, ""])


def _row(name: str, field: Json, required: list[str]) -> str:
    text = field.get("description", "")
    if name in required:
        text = f"Required. {text}".strip()
    return f"| `{name}` | {_kind(field)} | {text} |"


def _kind(field: Json) -> str:
    """Return what values a field may have, in a few words."""
    if "anyOf" in field:
        kinds = [_kind(part) for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return "object"
    kind = field.get("type", "any")
    if kind == "array":
        bound = f", up to {field['maxItems']:,}" if "maxItems" in field else ""
        return f"list of {_kind(field.get('items', {}))}{bound}"
    low, high = (_plain(field.get(name)) for name in ("minimum", "maximum"))
    if low and high:
        return f"{kind}, {low} to {high}"
    return f"{kind}, from {low}" if low else str(kind)


def _plain(bound: float | None) -> str:
    return "" if bound is None else f"{bound:g}" if isinstance(bound, float) else str(bound)


def write_into(page: str) -> str:
    """Return `page` with the tables between its marks."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} lacks the marks: {BEGIN}{END}")
    return head + BEGIN + render() + END + tail


if __name__ == "__main__":
    page = write_into(PAGE.read_text())
    if "--print" in sys.argv[1:]:
        sys.stdout.write(page)
    else:
        PAGE.write_text(page)
