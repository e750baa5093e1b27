"""The command line of `toka`: `key=value ...` to EngineConfig, and the table that `toka --help` prints.

The syntax is that of Tokasaurus: T, F, True and False; None; arithmetic in brackets, as '(512 * 1024)'; lists as a,b
or (a, b). Types, bounds and meanings are read from EngineConfig, so a key is described in one place only. Nothing is
evaluated: arithmetic is taken apart by `ast`. Every refusal is a ConfigError that names its key.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import inspect

from toka_engine.addresses import parse_udp_address
from toka_engine.config import (
    ALIASES,
    MAX_RANKS,
    UNSUPPORTED_KEYS,
    EngineConfig,
    UnsupportedKey,
    describe_sizes,
)
from toka_engine.errors import ConfigError
from toka_engine.logs import COMPONENTS
from toka_engine.topology import choose_topology

_BOOLEANS = {"T": True, "True": True, "true": True, "F": False, "False": False, "false": False}
_MAX_ARITHMETIC_CHARS = 200
_MAX_NUMBER = 2.0**64

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: float(base) ** exponent if exponent < 0 else base**exponent,
}


S = TypeVar("S", bound=msgspec.Struct)


def parse_config(arguments: Iterable[str]) -> EngineConfig:
    """Return the settings of `key=value` arguments. Raises ConfigError that names the first bad key."""
    config = parse_struct(EngineConfig, map(_without_alias, arguments), "toka", UNSUPPORTED_KEYS)
    if config.torch_compile_config != "default" and not config.torch_compile:
        raise ConfigError(f"torch_compile_config={config.torch_compile_config} has no effect without torch_compile=T")
    if config.torch_compile and config.quantization == "fp8":
        raise ConfigError("torch_compile=T does not work with quantization=fp8: compiled layers compute in bfloat16")
    _check_parallelism(config)
    if config.statsd_addr is not None:
        parse_udp_address(config.statsd_addr, "statsd_addr")
    _check_log_procs(config)
    return config


def _check_log_procs(config: EngineConfig) -> None:
    """Raise ConfigError for a name that no process of this engine has."""
    names = list(dict.fromkeys((*COMPONENTS, *(process.name for process in choose_topology(config).processes))))
    for name in config.log_procs:
        if name not in names:
            raise ConfigError(f"log_procs={name[:100]}: there is no such process; there are {', '.join(names)}")


def _check_parallelism(config: EngineConfig) -> None:
    """Raise ConfigError for sizes that exclude each other. What depends on the model or the device is found there."""
    for name, size in (("tp_size", config.tp_size), ("pp_size", config.pp_size)):
        if config.torch_compile and size > 1:
            raise ConfigError(f"torch_compile=T does not work with {name}={size} yet: it needs {name}=1")
    if config.dp_min_size is not None and config.dp_min_size > config.dp_size:
        raise ConfigError(f"dp_min_size={config.dp_min_size} is more than dp_size={config.dp_size}")
    if config.num_ranks > MAX_RANKS:
        sizes = describe_sizes(config)
        raise ConfigError(f"{sizes} are more than {MAX_RANKS} model workers")
    split = config.pp_layer_split
    if split is not None and len(split) != config.pp_size:
        text = ",".join(map(str, split))
        raise ConfigError(f"pp_layer_split={text} has the layers of {len(split)} stages, pp_size={config.pp_size}")
    if config.pp_size == 1 and config.pp_num_buffer_stages != 1:
        raise ConfigError(f"pp_num_buffer_stages={config.pp_num_buffer_stages} has no effect with pp_size=1")
    on_cpu = "device=cpu", config.device == "cpu"
    if config.async_tp_threshold is not None:
        _refuse_without_effect(config, "async_tp_threshold", ("tp_size=1", config.tp_size == 1), on_cpu)
    if config.cudagraph_max_prefill_size:
        without_graphs = "use_cudagraphs=F", not config.use_cudagraphs
        _refuse_without_effect(config, "cudagraph_max_prefill_size", without_graphs, on_cpu)


def _refuse_without_effect(config: EngineConfig, key: str, *cases: tuple[str, bool]) -> None:
    """Raise ConfigError if a setting that makes `key` useless is the case."""
    for setting, is_so in cases:
        if is_so:
            raise ConfigError(f"{key}={getattr(config, key)} has no effect with {setting}")


def _without_alias(argument: str) -> str:
    key, equals, text = argument.partition("=")
    return f"{ALIASES.get(key, key)}{equals}{text}"


def parse_struct(
    kind: type[S], arguments: Iterable[str], program: str, unbuilt: Mapping[str, UnsupportedKey] | None = None
) -> S:
    """Return a `kind` from `key=value` arguments: every field is a key. Raises ConfigError that names the key."""
    fields = {field.name: field for field in _struct(kind).fields}
    annotations = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not key=value; the keys are in: {program} --help")
        if key in values:
            raise ConfigError(f"{key} is given twice")
        if unbuilt and key in unbuilt:
            _check_unbuilt(key, text, unbuilt[key])
        elif key in fields:
            values[key] = _parse_field(key, text, fields[key].type, annotations[key])
        else:
            close = _suggestion(key, [*fields, *(unbuilt or ())])
            raise ConfigError(f"unknown key {key!r}{close}; the keys are in: {program} --help")
    if missing := [name for name, field in fields.items() if field.required and name not in values]:
        raise ConfigError(f"{missing[0]} is missing; the keys are in: {program} --help")
    return kind(**values)


def format_help() -> str:
    """The text of `toka --help`: usage and one entry per key with type, default and meaning."""
    usage = [
        "usage: toka [model=FOLDER_OR_HUB_NAME] [key=value ...]",
        "",
        "Serves a language model with an OpenAI-compatible API. Values: T/F for booleans, None, arithmetic",
        "in brackets as kv_cache_num_tokens='(512 * 1024)', lists as a,b.",
        "Environment: TOKA_API_KEY (clients must send it), HF_TOKEN, HF_ENDPOINT and HF_HOME (hub models),",
        "TOKA_CACHE_DIR (converted models), TOKA_BUILTIN_DIR and TOKA_KERNELS_DIR (models and compiled GPU kernels",
        "shipped with an image).",
        "",
    ]
    return "\n".join(usage) + "\n" + format_keys(EngineConfig)


def format_keys(kind: type[msgspec.Struct]) -> str:
    """Return two lines per key: its type and default, and its meaning."""
    lines = []
    for field in _struct(kind).fields:
        kind_text, meaning = _describe(field.type)
        lines.append(f"  {field.name} ({kind_text}){', required' if field.required else f' = {_default(field)}'}")
        lines.append(f"      {meaning}")
    return "\n".join(lines)


def parse_number(text: str) -> int | float:
    """Return the value of a number, or of arithmetic in brackets. Raises ValueError that says why not."""
    if not (text.startswith("(") and text.endswith(")")):
        return _plain_number(text)
    if len(text) > _MAX_ARITHMETIC_CHARS:
        raise ValueError(f"arithmetic is longer than {_MAX_ARITHMETIC_CHARS} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _compute(tree.body)
    except SyntaxError as error:
        raise ValueError("not arithmetic") from error
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"arithmetic fails: {error}") from error


def _plain_number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise ValueError("not a number") from error


def _compute(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result: int | float = value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_compute(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            result = _compute(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            first, second = _compute(left), _compute(right)
            if isinstance(op, ast.Pow) and abs(second) > 64:
                raise ValueError("an exponent is beyond 64")
            result = _BINARY[type(op)](first, second)
        case _:
            raise ValueError("only numbers and + - * / // % ** are allowed in brackets")
    if isinstance(result, complex) or abs(result) > _MAX_NUMBER:
        raise ValueError("a number is out of range")
    return result


def _check_unbuilt(key: str, text: str, unbuilt: UnsupportedKey) -> None:
    """Let pass the one value that describes what is done anyway; refuse every other."""
    accepted, sentence = unbuilt
    spellings = {True: ("T", "True", "true"), False: ("F", "False", "false")}
    allowed = spellings[accepted] if isinstance(accepted, bool) else (str(accepted),)
    if text not in allowed:
        raise ConfigError(f"{key} has no effect here and is refused: {sentence}")


def _parse_field(key: str, text: str, kind: inspect.Type, annotation: Any) -> Any:
    try:
        value = _parse_value(text, kind)
        return msgspec.convert(value, annotation, strict=True)
    except (ValueError, msgspec.ValidationError) as error:
        reason = str(error).replace("`", "")
        raise ConfigError(f"{key}={text[:100]}: {reason} (expected: {_describe(kind)[0]})") from error


def _parse_value(text: str, kind: inspect.Type) -> Any:
    match kind:
        case inspect.Metadata(type=inner):
            return _parse_value(text, inner)
        case inspect.UnionType(types=types):
            if text == "None":
                return None
            (inner,) = [one for one in types if not isinstance(one, inspect.NoneType)]
            return _parse_value(text, inner)
        case inspect.BoolType():
            if text not in _BOOLEANS:
                raise ValueError("not a boolean")
            return _BOOLEANS[text]
        case inspect.IntType():
            number = parse_number(text)
            if not math.isfinite(number) or number != int(number):
                raise ValueError("not an integer")
            return int(number)
        case inspect.FloatType():
            number = float(parse_number(text))
            if not math.isfinite(number):
                raise ValueError("not a finite number")
            return number
        case inspect.VarTupleType():
            return tuple(_parse_value(item, kind.item_type) for item in _parse_list(text))
        case _:
            return text


def _parse_list(text: str) -> tuple[str, ...]:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    items = (item.strip().strip("'\"") for item in text.split(","))
    return tuple(item for item in items if item)


def _suggestion(key: str, keys: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _struct(kind: type[msgspec.Struct]) -> inspect.StructType:
    info = inspect.type_info(kind)
    if not isinstance(info, inspect.StructType):
        raise AssertionError(f"{kind} is not a struct")
    return info


def _default(field: inspect.Field) -> str:
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if isinstance(value, bool):
        return "T" if value else "F"
    if isinstance(value, tuple):
        return ",".join(value) or "()"
    return str(value)


def _describe(kind: inspect.Type) -> tuple[str, str]:
    """Return a field's type as people write it, and its meaning."""
    match kind:
        case inspect.Metadata(type=inner, extra_json_schema=extra):
            return _describe(inner)[0], (extra or {}).get("description", "")
        case inspect.UnionType(types=types):
            return " or ".join(_describe(one)[0] for one in types), ""
        case inspect.NoneType():
            return "None", ""
        case inspect.BoolType():
            return "T or F", ""
        case inspect.LiteralType(values=values):
            return " | ".join(str(value) for value in values), ""
        case inspect.VarTupleType():
            return "list", ""
        case inspect.IntType() | inspect.FloatType():
            return _describe_number(kind), ""
        case _:
            return "text", ""


def _describe_number(kind: inspect.IntType | inspect.FloatType) -> str:
    name = "integer" if isinstance(kind, inspect.IntType) else "number"
    bounds = (("> ", kind.gt), (">= ", kind.ge), ("< ", kind.lt), ("<= ", kind.le))
    limits = [f"{sign}{bound}" for sign, bound in bounds if bound is not None and bound < 2**31 - 1]
    return " ".join([name, *limits])
