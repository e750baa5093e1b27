"""Reads which texts a request allows (`response_format`, `structured_outputs`, `guided_*`) into one grammar source.

Owns: the fields' forms, and the bounds that a source must keep before anybody compiles it. Each refusal is a 400 that
names the field. Pure: what compiles a source is `grammar_checks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import msgspec

from toka_engine.grammar.source import GrammarSource
from toka_engine.server.decoding import decode_part
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.request import NULL

MAX_SOURCE_BYTES = 64 * 1024
MAX_ENUM_BYTES = 1024 * 1024
"""The most bytes of a schema or of choices, where more than MAX_SOURCE_BYTES are values of enumerations."""
MAX_DEPTH = 64
MAX_PROPERTIES = 2_000
MAX_ENUM_VALUES = 10_000
MAX_REGEX_BYTES = 4 * 1024
MAX_REPETITIONS = 10_000
MAX_NAME_CHARACTERS = 64
_REPETITIONS = ("minItems", "minLength", "minProperties")

T = TypeVar("T")


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's `json_schema` part of a `response_format`."""

    name: str
    schema: msgspec.Raw = NULL
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's `response_format`."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: one of these."""

    json: msgspec.Raw = NULL
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GrammarFields(Protocol):
    """The fields of a request that this module reads; JSON null is absence."""

    @property
    def response_format(self) -> msgspec.Raw: ...

    @property
    def structured_outputs(self) -> msgspec.Raw: ...

    @property
    def guided_json(self) -> msgspec.Raw: ...

    @property
    def guided_regex(self) -> str | None: ...

    @property
    def guided_choice(self) -> list[str] | None: ...

    @property
    def guided_grammar(self) -> str | None: ...


class AskedGrammar(msgspec.Struct, frozen=True):
    """A source, and the field that asks for it."""

    source: GrammarSource
    param: str


def read_grammar(request: GrammarFields) -> AskedGrammar | None:
    """Return the one grammar that `request` asks for; None where it asks for none. Raises a 400."""
    if (
        request.response_format is NULL
        and request.structured_outputs is NULL
        and request.guided_json is NULL
        and request.guided_regex is None
        and request.guided_choice is None
        and request.guided_grammar is None
    ):
        return None
    found = [*_read_response_format(request.response_format), *_read_structured(request.structured_outputs)]
    found += _read_parts(
        StructuredOutputs(request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar),
        "guided_",
    )
    if len(found) > 1:
        names = " and ".join(f"'{asked.param}'" for asked in found[:2])
        raise invalid(found[1].param, f"{names} exclude each other: a request has one grammar.")
    return found[0] if found else None


def _read_response_format(raw: msgspec.Raw) -> Iterator[AskedGrammar]:
    name = "response_format"
    form = decode_field(raw, ResponseFormat, name)
    if form is None:
        return
    if form.type != "json_schema" and form.json_schema is not None:
        raise invalid(f"{name}.json_schema", f"'{name}.json_schema' needs '{name}.type' to be \"json_schema\".")
    match form.type:
        case "text":
            return
        case "json_object":
            yield AskedGrammar(GrammarSource("json_object", ""), name)
        case "json_schema":
            if form.json_schema is None:
                raise _missing(f"{name}.json_schema")
            path = f"{name}.json_schema"
            if not 1 <= len(form.json_schema.name) <= MAX_NAME_CHARACTERS:
                raise invalid(f"{path}.name", f"'{path}.name' must have 1 to {MAX_NAME_CHARACTERS} characters.")
            if is_null(form.json_schema.schema):
                raise _missing(f"{path}.schema")
            yield read_schema(form.json_schema.schema, f"{path}.schema", is_lenient=not form.json_schema.strict)
        case _:
            allowed = "text, json_object, json_schema"
            raise invalid(f"{name}.type", f"'{name}.type' must be one of {allowed}.", "invalid_value")


def _read_structured(raw: msgspec.Raw) -> Iterator[AskedGrammar]:
    parts = decode_field(raw, StructuredOutputs, "structured_outputs")
    if parts is None:
        return
    found = list(_read_parts(parts, "structured_outputs."))
    if not found:
        raise invalid(
            "structured_outputs", "'structured_outputs' needs one of json, regex, choice, grammar, json_object."
        )
    yield from found


def _read_parts(parts: StructuredOutputs, prefix: str) -> Iterator[AskedGrammar]:
    if not is_null(parts.json):
        yield _read_schema_or_text(parts.json, f"{prefix}json")
    if parts.regex is not None:
        yield AskedGrammar(GrammarSource("regex", _check_regex(parts.regex, f"{prefix}regex")), f"{prefix}regex")
    if parts.choice is not None:
        yield _read_choice(parts.choice, f"{prefix}choice")
    if parts.grammar is not None:
        _check_size(len(parts.grammar.encode()), f"{prefix}grammar")
        if not parts.grammar.strip():
            raise invalid(f"{prefix}grammar", f"'{prefix}grammar' is empty.")
        yield AskedGrammar(GrammarSource("lark", parts.grammar), f"{prefix}grammar")
    if parts.json_object is not None:
        if not parts.json_object:
            raise invalid(f"{prefix}json_object", f"'{prefix}json_object' may only be true, or left out.")
        yield AskedGrammar(GrammarSource("json_object", ""), f"{prefix}json_object")


def _read_schema_or_text(raw: msgspec.Raw, param: str) -> AskedGrammar:
    """vLLM takes a schema as an object or as its JSON in a string."""
    _check_size(memoryview(raw).nbytes, param, MAX_ENUM_BYTES)
    if bytes(memoryview(raw)[:1]) == b'"':
        raw = msgspec.Raw(decode_part(msgspec.json.Decoder(str).decode, raw, param).encode())
    return read_schema(raw, param, is_lenient=False)


def read_schema(raw: msgspec.Raw, param: str, *, is_lenient: bool) -> AskedGrammar:
    """Return the grammar of a JSON schema within its bounds."""
    num_bytes = memoryview(raw).nbytes
    _check_size(num_bytes, param, MAX_ENUM_BYTES)
    schema = decode_part(msgspec.json.decode, raw, param)
    if not isinstance(schema, dict):
        raise invalid(param, f"'{param}' must be a JSON schema: an object.", "invalid_type")
    num_enum_bytes = _check_schema(schema, param)
    _check_size(num_bytes - num_enum_bytes, param)
    return AskedGrammar(GrammarSource("json_schema", bytes(memoryview(raw)).decode(), is_lenient), param)


def _check_schema(schema: dict[str, Any], param: str) -> int:
    """Walk through `schema`, level by level; return the bytes of its enumerations' values."""
    num_properties = num_enum_values = num_enum_bytes = 0
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for node in level:
            if isinstance(node, list):
                deeper += node
                continue
            if not isinstance(node, dict):
                continue
            for name, value in node.items():
                if name == "enum" and isinstance(value, list):
                    num_enum_values += len(value)
                    num_enum_bytes += len(msgspec.json.encode(value))
                elif name in ("properties", "patternProperties") and isinstance(value, dict):
                    num_properties += len(value)
                elif name in _REPETITIONS and isinstance(value, int | float) and value > MAX_REPETITIONS:
                    raise invalid(param, f"'{param}': '{name}' is more than {MAX_REPETITIONS}.", "invalid_value")
                elif name == "pattern" and isinstance(value, str):
                    _check_regex(value, param, f"a 'pattern' of '{param}'")
                deeper.append(value)
        _check_count(num_properties, MAX_PROPERTIES, "properties", param)
        _check_count(num_enum_values, MAX_ENUM_VALUES, "enum values", param)
        level = deeper
        if not level:
            return num_enum_bytes
    raise invalid(param, f"'{param}' is nested more than {MAX_DEPTH} levels deep.", "invalid_value")


def _read_choice(choices: list[str], param: str) -> AskedGrammar:
    _check_count(len(choices), MAX_ENUM_VALUES, "choices", param)
    text = msgspec.json.encode(choices).decode()
    _check_size(len(text), param, MAX_ENUM_BYTES)
    if not choices or not all(choices):
        raise invalid(param, f"'{param}' needs at least one choice, none of them empty.", "invalid_value")
    return AskedGrammar(GrammarSource("choice", text), param)


def _check_regex(regex: str, param: str, named: str = "") -> str:
    if not regex:
        raise invalid(param, f"{named or repr(param)} is empty.", "invalid_value")
    if len(regex.encode()) > MAX_REGEX_BYTES:
        raise invalid(param, f"{named or repr(param)} has more than {MAX_REGEX_BYTES} bytes.", "invalid_value")
    return regex


def _check_size(num_bytes: int, param: str, most: int = MAX_SOURCE_BYTES) -> None:
    if num_bytes > most:
        raise invalid(param, f"'{param}' has more than {most} bytes.", "invalid_value")


def _check_count(count: int, most: int, what: str, param: str) -> None:
    if count > most:
        raise invalid(param, f"'{param}' has {count} {what}; at most {most} are allowed.", "invalid_value")


def _missing(param: str) -> ApiError:
    return invalid(param, f"'{param}' is missing.", "missing_required_parameter")


def is_null(raw: msgspec.Raw) -> bool:
    return bytes(memoryview(raw)) == b"null"


def decode_field(raw: msgspec.Raw, kind: type[T], param: str) -> T | None:
    """Return the field `param`, which the body's decoder has skipped; None for null."""
    _check_size(memoryview(raw).nbytes, param, 2 * MAX_ENUM_BYTES)
    decoded: T | None = decode_part(msgspec.json.Decoder(kind | None).decode, raw, param)
    return decoded
