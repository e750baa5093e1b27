"""Values of every field of a TokaDeployment's spec, made from the CRD's schema: so a new field is tried by itself.

For each field: another value than its default, its bounds, every choice, and what its type or its bounds refuse. For
each field within the lists and maps that it holds: one value, at a bound, and what is refused. A value is put into the
smallest spec that has the field.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.harness.paths import REPOSITORY

Json = dict[str, Any]
CRD: Path = REPOSITORY / "crds" / "tokadeployments.yaml"
WORDS = ("x", "hf://org/name", "org/x", "/x", "1Gi", "seed=1", "10.0.0.0/8", "spec.nodeName")
"""Texts that fields with a pattern are tried with: of each, those that match."""
SAMPLES: dict[str, list[Any]] = {
    "model.source": ["hf://org/name", "file:///m", "pvc://claim/m", "oci://host:5000/org/name:v1?path=/m"],
    "engine.extraArgs[]": ["seed=1"],
    "engine.env[].valueFrom.fieldRef.fieldPath": ["spec.nodeName", "metadata.labels['x']"],
    "resources.memory": ["64Mi", "2Gi", 134217728],
    "data.size": ["512Mi", "1Gi"],
}
"""Values of fields whose rules no schema shows."""
MAX_TEXT = 4096
"""A longer text than this is not tried."""


@dataclass(frozen=True, slots=True)
class Case:
    """One value of one field. `path` has dots between names, and [] behind a list's."""

    path: str
    value: Any
    is_sound: bool
    """Whether the schema accepts it; a rule may refuse it all the same."""

    @property
    def field(self) -> str:
        """The field of the spec that it is in: a list or a map counts as one."""
        return re.split(r"\[\]|\{\}", self.path)[0]

    def put_into(self, spec: Json) -> Json:
        """The spec with this value; fields that it needs beside it come from `spec` or are the smallest."""
        merged: Json = copy.deepcopy(spec)
        schema = read_schema()
        _put(merged, self.path.replace("[]", ".[]").replace("{}", ".{}").split("."), self.value, schema)
        return merged

    def __str__(self) -> str:
        return f"{self.path}={str(self.value)[:40]}"


def read_schema() -> Json:
    """The schema of spec."""
    crd: Json = _load()
    return dict(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"])


_LOADED: list[Json] = []


def _load() -> Json:
    if not _LOADED:
        _LOADED.append(yaml.safe_load(CRD.read_text()))
    return _LOADED[0]


def list_cases() -> list[Case]:
    """Every case, in the order of the schema."""
    return list(_cases(read_schema(), ""))


def list_fields() -> set[str]:
    """Every field of the spec that is no group of fields, lists and maps as one."""
    return {case.field for case in list_cases() if case.is_sound}


def _cases(schema: Json, path: str) -> Iterator[Case]:
    """The cases of a schema and of all that is within it."""
    if "properties" in schema:
        if path:
            yield Case(path, "x", False)
        for name, inner in schema["properties"].items():
            yield from _cases(inner, f"{path}.{name}".lstrip("."))
        return
    is_within = "[]" in path or "{}" in path
    sound = _sound(schema, path)
    for value in sound[-1:] if is_within else sound:
        yield Case(path, value, True)
    for value in _unsound(schema):
        yield Case(path, value, False)
    if schema.get("type") == "array":
        yield from _cases(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _cases(schema["additionalProperties"], f"{path}{{}}")


def _sound(schema: Json, path: str) -> list[Any]:
    kind = schema.get("type")
    if path in SAMPLES:
        return SAMPLES[path]
    if "enum" in schema:
        return list(schema["enum"])
    if kind == "boolean":
        return [True, False]
    if kind == "integer":
        low, high = schema.get("minimum", 0), schema.get("maximum", 1000)
        return sorted({low, min(high, low + 60), high})
    if schema.get("x-kubernetes-int-or-string"):
        return ["1Gi", 1] if re.fullmatch(schema["pattern"], "1Gi") else ["1", 2, "500m"]
    if kind == "string":
        longest = "x" * schema.get("maxLength", MAX_TEXT + 1)
        words = [word for word in WORDS if _fits(word, schema)]
        return words[:1] + ([longest] if len(longest) <= MAX_TEXT and _fits(longest, schema) else [])
    if kind == "array":
        item = make_smallest(schema["items"], f"{path}[]")
        return [[], [item]]
    if isinstance(schema.get("additionalProperties"), dict):
        return [{}, {"x": make_smallest(schema["additionalProperties"], f"{path}{{}}")}]
    return [{}]


def _unsound(schema: Json) -> list[Any]:
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        return [True, "lots"]
    if kind == "boolean":
        return ["true", 1]
    if kind == "integer":
        beyond = [schema["minimum"] - 1] if "minimum" in schema else []
        return ["1", 1.5, *beyond, *([schema["maximum"] + 1] if "maximum" in schema else [])]
    if kind == "string":
        wrong = [7, *(["x" * (schema["maxLength"] + 1)] if "maxLength" in schema else [])]
        wrong += [""] if schema.get("minLength") else []
        return [*wrong, *(["no such"] if "enum" in schema or "pattern" in schema else [])]
    if kind == "array":
        items = make_smallest(schema["items"], "") if schema["items"].get("type") != "object" else {}
        return ["x", *([[items] * (schema["maxItems"] + 1)] if "maxItems" in schema else [])]
    if isinstance(schema.get("additionalProperties"), dict):
        limit = schema.get("maxProperties")
        return ["x", *([{f"x{n}": "x" for n in range(limit + 1)}] if limit else [])]
    return ["x"]


def _fits(word: str, schema: Json) -> bool:
    is_long_enough = schema.get("minLength", 0) <= len(word) <= schema.get("maxLength", MAX_TEXT)
    return is_long_enough and re.search(schema.get("pattern", ""), word) is not None


def make_smallest(schema: Json, path: str) -> Any:
    """The smallest sound value of a schema."""
    if "properties" in schema:
        names = schema.get("required", [])
        return {name: make_smallest(schema["properties"][name], f"{path}.{name}") for name in names}
    if schema.get("type") == "array":
        return []
    found = _sound(schema, path)
    assert found, f"no sample fits the pattern of {path}: add one to SAMPLES"
    return found[0]


def _put(holder: Any, names: list[str], value: Any, schema: Json) -> None:
    """Puts a value into an object, list or map, making what is on the way to it."""
    name, rest = names[0], names[1:]
    inner = schema["items"] if name == "[]" else schema.get("additionalProperties")
    inner = inner if name in ("[]", "{}") else schema["properties"][name]
    if not rest:
        made = value
    elif rest[0] == "[]":
        made = (holder.get(name) if name not in ("[]", "{}") else None) or []
        _put(made, rest, value, inner)
    else:
        known = holder.get(name) if isinstance(holder, dict) and name != "{}" else None
        made = known if isinstance(known, dict) else make_smallest(inner, "")
        _put(made, rest, value, inner)
    if name == "[]":
        holder[:] = [made]
    else:
        holder["x" if name == "{}" else name] = made
