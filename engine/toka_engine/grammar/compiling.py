"""Compiles grammar sources with llguidance, under limits of work and memory.

The grammar checker and the model workers compile alike, so that a source that has lived through the one compiles in the
other. Limits count work, never seconds: the same source gives the same result on any machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from toka_engine.errors import TokaError
from toka_engine.grammar.source import GrammarSource

LIMITS: Final = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""The library's own limits of work per grammar and per mask, but a fifth of its lexer states, which take up to 2 kB."""
_WHITE_SPACE = r"[ \n]"
"""At most one blank or newline between two JSON tokens, so that a small model cannot fill its limit with blanks."""
_MAX_MESSAGE = 400
_DUMPS = ("<state>", "<non-verbose/>", "<backtrace>")
_PANIC = "panic: "
_UNIMPLEMENTED = re.compile(r'Unimplemented keys: (\["[^\n]*"\])')
_UNKNOWN_FORMAT = re.compile(r"Unknown format: ")


class GrammarError(TokaError):
    """A source that is no grammar, asks for what the library cannot enforce, or takes too much work."""


def load_vocabulary(folder: Path, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
    """Return the tokens of `folder`/tokenizer.json for `compile_grammar`, padded to the model's vocabulary."""
    return LLTokenizer(str(folder / "tokenizer.json"), n_vocab=vocab_size, eos_token=list(end_ids))


def compile_grammar(source: GrammarSource, vocabulary: LLTokenizer) -> LLMatcher:
    """Return a matcher at the start of a text; copies of it are cheap. Raises GrammarError."""
    matcher = LLMatcher(vocabulary, _to_library(source), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(_shorten(matcher.get_error()))
    return matcher


def find_dropped_keywords(matcher: LLMatcher) -> list[str]:
    """Return the names of the keywords that a lenient source has and the matcher does not enforce."""
    found: list[str] = []
    for warning in matcher.get_grammar_warnings():
        if listed := _UNIMPLEMENTED.search(warning):
            found += map(str, msgspec.json.decode(listed[1]))
        elif _UNKNOWN_FORMAT.match(warning):
            found.append("format")
        else:
            found.append(re.split(r"\W", warning, maxsplit=1)[0])
    return list(dict.fromkeys(name for name in found if name))


def _to_library(source: GrammarSource) -> str:
    """Return the source in the library's own form. Raises GrammarError."""
    match source.kind:
        case "json_object":
            return _from_schema('{"type":"object"}', is_lenient=False)
        case "json_schema":
            return _from_schema(source.text, is_lenient=source.is_lenient)
        case "regex":
            return LLMatcher.grammar_from_regex(source.text)
        case "choice":
            # A Lark string has JSON's escapes, but only ASCII is safe from its lexer.
            choices = " | ".join(json.dumps(choice) for choice in msgspec.json.decode(source.text, type=list[str]))
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        case "lark":
            return LLMatcher.grammar_from_lark(source.text)


def _from_schema(schema: str, *, is_lenient: bool) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _WHITE_SPACE, "lenient": is_lenient}
        )
    except ValueError as error:
        raise GrammarError(_shorten(str(error))) from error


def _shorten(message: str) -> str:
    """Return the first lines of the library's message, without its dump of the parser's state or of its own stack."""
    for dump in _DUMPS:
        message = message.partition(dump)[0]
    text = " ".join(message.split())
    if text.startswith(_PANIC):  # a limit inside the library that it states as an assertion
        text = f"it is too much for the grammar library ({text.removeprefix(_PANIC)})"
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."
