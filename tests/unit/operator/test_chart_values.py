"""The chart's values explain themselves: each has a comment, a place in the schema and a row in the chart's README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "toka"


def rows() -> list[list[str]]:
    """The cells of the README's table of values."""
    lines = (CHART / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]


def open_objects(schema: Json, path: str) -> list[str]:
    """Objects within a schema that take a field which it does not name, and do not say of which type."""
    found = []
    if schema.get("type") == "object" and "additionalProperties" not in schema:
        found.append(path)
    for name, inner in schema.get("properties", {}).items():
        found += open_objects(inner, f"{path}.{name}")
    return found + (open_objects(schema["items"], f"{path}[]") if "items" in schema else [])


def untyped_values(values: Json, schema: Json, path: str = "") -> list[str]:
    """Values that the schema does not know, or says nothing of."""
    found = []
    for name, value in values.items():
        field = schema["properties"].get(name, {})
        if not {"type", "enum"} & field.keys():
            found.append(f"{path}{name}")
        elif isinstance(value, dict) and "properties" in field:
            found += untyped_values(value, field, f"{path}{name}.")
    return found


def test_the_readme_is_made_from_the_values() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "chart_docs.py"), "--print"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (CHART / "README.md").read_text() == printed, "run scripts/chart_docs.py"


def test_every_value_has_a_comment() -> None:
    found = rows()
    assert len(found) > 30
    assert [cells[0] for cells in found if len(cells) != 3 or not cells[2].endswith(".")] == []


def test_the_schema_knows_every_value_and_is_open_only_where_kubernetes_checks() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert untyped_values(yaml.safe_load((CHART / "values.yaml").read_text()), schema) == []
    kubernetes = ["affinity.nodeAffinity", "affinity.podAffinity", "affinity.podAntiAffinity"]
    assert open_objects(schema, "") == [".global", *(f".{path}" for path in kubernetes)]
