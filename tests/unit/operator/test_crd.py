"""The CRD explains itself: every field has a description, and the page of the docs is made from them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from toka_operator.fingerprint import KNOWN_FIELDS, POD_FIELDS, compute_fingerprint
from toka_operator.spec import DEFAULTS

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]
CRD = ROOT / "crds" / "tokadeployments.yaml"


def fields_of(schema: Json, path: str = "") -> dict[str, Json]:
    """Path -> every field of a schema, those of lists and objects within it included."""
    found: dict[str, Json] = {}
    for name, field in schema.get("properties", {}).items():
        inner = f"{path}.{name}".lstrip(".")
        found |= {inner: field, **fields_of(field, inner), **fields_of(field.get("items", {}), f"{inner}[]")}
    return found


def test_kubectl_explain_describes_every_field() -> None:
    schema = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    fields = fields_of(schema)
    assert len(fields) > 150
    bare = [path for path, field in fields.items() if not field.get("description") and path != "metadata"]
    assert bare == []
    unfinished = [path for path, field in fields.items() if not field.get("description", ".").endswith(".")]
    assert unfinished == []


def test_the_page_of_the_docs_is_made_from_the_crd() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "crd_docs.py"), "--print"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (ROOT / "docs" / "tokadeployment.md").read_text() == printed, "run scripts/crd_docs.py"


def test_a_newer_crds_fields_make_no_other_revision_of_an_operator_that_does_not_know_them() -> None:
    """While an upgrade is under way, the older operator sees what the newer CRD fills in."""
    schema = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    groups = schema["properties"]["spec"]["properties"]
    assert {name: set(groups[name]["properties"]) for name in POD_FIELDS} == KNOWN_FIELDS
    spec: Json = {"model": {"source": "builtin://smollm2"}, "replicas": 2}
    newer = {**spec, **{name: {**spec.get(name, {}), "newField": "default"} for name in POD_FIELDS}}
    assert compute_fingerprint(newer, DEFAULTS) == compute_fingerprint(spec, DEFAULTS)
