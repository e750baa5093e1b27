"""The spec: defaults, what is refused, and what makes a new revision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from toka_operator.errors import FieldError
from toka_operator.routing import PICKER_DEFAULTS
from toka_operator.spec import DEFAULTS, parse, parse_source

from tests.unit.operator.examples import body, valid

CRD = Path(__file__).parents[3] / "crds" / "tokadeployments.yaml"


def crd_spec_schema() -> dict[str, Any]:
    crd = yaml.safe_load(CRD.read_text())
    schema: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def defaults_of(schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in schema["properties"].items():
        if field.get("type") == "object" and "properties" in field:
            inner = defaults_of(field)
            if inner or "default" in field:
                found[name] = inner
        elif "default" in field:
            found[name] = field["default"]
    return found


def test_the_crd_and_the_parser_have_the_same_defaults() -> None:
    from_crd = defaults_of(crd_spec_schema())
    references = from_crd.pop("auth")
    assert references == {"hfTokenSecretRef": {"key": "token"}, "apiKeySecretRef": {"key": "key"}}
    routing = from_crd.pop("routing")
    assert routing == {"inferencePool": {"endpointPickerRef": PICKER_DEFAULTS}, "httpRoute": {}}
    expected = {k: v for k, v in DEFAULTS.items() if k not in ("auth", "routing")}
    assert from_crd == expected


def unbounded(schema: dict[str, Any], path: str) -> list[str]:
    kind = schema.get("type")
    found = []
    if kind == "string" and not ({"maxLength", "enum", "format"} & schema.keys()):
        found.append(path)
    if kind == "array":
        found += [path] if "maxItems" not in schema else []
        found += unbounded(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        found += [path] if "maxProperties" not in schema else []
        found += unbounded(schema["additionalProperties"], f"{path}{{}}")
    for name, field in schema.get("properties", {}).items():
        found += unbounded(field, f"{path}.{name}")
    return found


def test_every_list_and_string_of_the_spec_is_bounded() -> None:
    assert unbounded(crd_spec_schema(), "spec") == []


def test_a_minimal_spec_has_every_default() -> None:
    spec = valid()
    assert spec.replicas == 1
    assert spec.resources.device == "gpu"
    assert spec.model.served_name == "smollm2"
    assert spec.rollout.max_surge == 1
    assert spec.rollout.drain_timeout_s == 120
    assert spec.startup_timeout_s == 1800
    assert spec.has_disruption_budget


@pytest.mark.parametrize(
    ("source", "kind", "location", "claim", "served"),
    [
        ("hf://HuggingFaceTB/SmolLM2-135M", "hf", "HuggingFaceTB/SmolLM2-135M", "", "SmolLM2-135M"),
        ("pvc://models/llama/8b", "pvc", "/llama/8b", "models", "8b"),
        ("pvc://models", "pvc", "", "models", "models"),
        ("oci://registry.example/org/tiny:v1", "oci", "", "", "tiny"),
        ("oci://host:5000/tiny?path=/models/x", "oci", "/models/x", "", "tiny"),
        ("file:///opt/models/tiny", "file", "/opt/models/tiny", "", "tiny"),
        ("builtin://smollm2", "builtin", "builtin://smollm2", "", "smollm2"),
    ],
)
def test_each_kind_of_source_is_taken_apart(source: str, kind: str, location: str, claim: str, served: str) -> None:
    parsed = valid(model={"source": source}).model
    assert (parsed.source.kind, parsed.source.location, parsed.source.claim) == (kind, location, claim)
    assert parsed.served_name == served


@pytest.mark.parametrize(
    "source",
    ["", "smollm2", "hf://only-org", "hf://a/b/c", "pvc://", "pvc://UPPER/x", "file://relative", "s3://a/b",
     "file:///a/../etc", "pvc://models/../x", "builtin://other", "hf://a/b c", "hf://-x/y",
     "oci://", "oci://alone", "oci://host/Upper", "oci://host/a:", "oci://host/a@sha256:12", "oci://host/a..b",
     "oci://host/a?path=models", "oci://host/a?path=/../x", "oci://host/a:b:c", "oci://host//a", "oci://host/a?x=/m"],
)  # fmt: skip
def test_other_sources_are_refused(source: str) -> None:
    assert parse_source(source) is None


@pytest.mark.parametrize("tail", ["", ":v1.0", f"@sha256:{'0' * 64}", f":v1@sha256:{'f' * 64}"])
@pytest.mark.parametrize("name", ["registry.example/org/tiny", "localhost:5000/a/b__c/d-e", "host/x"])
def test_an_image_is_named_as_a_pod_names_it(name: str, tail: str) -> None:
    for path in ("", "/models/8b"):
        source = parse_source(f"oci://{name}{tail}" + (f"?path={path}" if path else ""))
        assert source is not None
        assert (source.image, source.location, source.tail) == (name + tail, path, name.rsplit("/", 1)[-1])


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("spec.model.source", {"model": {}}),
        ("spec.model.revision", {"model": {"source": "builtin://smollm2", "revision": "main"}}),
        ("spec.model.revision", {"model": {"source": "oci://host/a:b", "revision": "main"}}),
        ("spec.model", {"model": "builtin://smollm2"}),
        ("spec.engine.port", {"engine": {"port": 80}}),
        ("spec.engine.port", {"engine": {"port": "http"}}),
        ("spec.engine.hydragen", {"engine": {"hydragen": "yes"}}),
        ("spec.engine.extraArgs", {"engine": {"extraArgs": "a=b"}}),
        ("spec.replicas", {"replicas": -1}),
        ("spec.replicas", {"replicas": True}),
        ("spec.resources.device", {"resources": {"device": "tpu"}}),
        ("spec.resources.cpu", {"resources": {"cpu": [1]}}),
        ("spec.cache.claimName", {"cache": {"type": "ExistingPVC"}}),
        ("spec.cache.claimName", {"cache": {"claimName": "x"}}),
        ("spec.auth.hfTokenSecretRef.name", {"auth": {"hfTokenSecretRef": {}}}),
        ("spec.rollout.maxSurge", {"rollout": {"maxSurge": 0}}),
        ("spec.rollout.strategy", {"rollout": {"strategy": "Blue"}}),
        ("spec.rollout.maxSurge", {"rollout": {"strategy": "InPlace", "maxSurge": 2}}),
        ("spec.rollout.canary.seconds", {"rollout": {"canary": {"seconds": -1}}}),
        ("spec.rollout.canary", {"rollout": {"canary": 60}}),
        ("spec.rollout.canary", {"rollout": {"canary": {"seconds": 60}, "strategy": "InPlace"}}),
        ("spec.rollout.canary", {"rollout": {"canary": {"seconds": 60}, "maxSurge": 0, "maxUnavailable": 1}}),
        ("spec.rollout.canary", {"rollout": {"canary": {"seconds": 60}, "surgeFallbackSeconds": 9}}),
        ("spec.rollout.progressDeadlineSeconds", {"rollout": {"canary": {"seconds": 3600}}}),
        ("spec.rollout.maxUnavailable", {"rollout": {"strategy": "Recreate", "maxUnavailable": 1}}),
        ("spec.rollout.surgeFallbackSeconds", {"rollout": {"strategy": "InPlace", "surgeFallbackSeconds": 9}}),
        (
            "spec.rollout.surgeFallbackSeconds",
            {"rollout": {"maxSurge": 0, "maxUnavailable": 1, "surgeFallbackSeconds": 9}},
        ),
        ("spec.rollout.progressDeadlineSeconds", {"rollout": {"progressDeadlineSeconds": 1800}}),
        (
            "spec.rollout.progressDeadlineSeconds",
            {"rollout": {"progressDeadlineSeconds": 20, "minReadySeconds": 20}, "startup": {"timeoutSeconds": 10}},
        ),
        ("spec.parallelism.data", {"parallelism": {"data": 9}}),
        ("spec.parallelism.tensor", {"parallelism": {"tensor": 0}}),
        ("spec.parallelism.tensor", {"parallelism": {"tensor": 4, "data": 3}}),
        ("spec.parallelism.tensor", {"parallelism": {"tensor": 2, "pipeline": 3, "data": 2}}),
        ("spec.parallelism.pipeline", {"parallelism": {"pipeline": 9}}),
        ("spec.parallelism.minimumData", {"parallelism": {"data": 2, "minimumData": 3}}),
        ("spec.parallelism.asyncTensorThreshold", {"parallelism": {"asyncTensorThreshold": 4096}}),
        ("spec.parallelism.asyncTensorThreshold", {"parallelism": {"tensor": 2, "asyncTensorThreshold": 0}}),
        (
            "spec.parallelism.asyncTensorThreshold",
            {"parallelism": {"tensor": 2, "asyncTensorThreshold": 4096}, "resources": {"device": "cpu"}},
        ),
        ("spec.service.annotations", {"service": {"annotations": []}}),
        ("spec.scheduling.tolerations", {"scheduling": {"tolerations": ["x"]}}),
    ],
)
def test_a_bad_field_is_named(path: str, spec: dict[str, Any]) -> None:
    errors = parse(body(**spec))
    assert isinstance(errors, list)
    assert path in [error.path for error in errors]


def test_every_bad_field_is_named_at_once() -> None:
    errors = parse(body(replicas=-1, engine={"port": 1}, suspend="no"))
    assert isinstance(errors, list)
    assert {e.path for e in errors} == {"spec.replicas", "spec.engine.port", "spec.suspend"}
    assert all(isinstance(e, FieldError) and e.message for e in errors)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(DEFAULTS)), JSON)
def test_no_value_of_any_field_makes_the_parser_fail(name: str, value: Any) -> None:
    parsed = parse(body(**{name: value}))
    assert not isinstance(parsed, list) or all(error.path.startswith("spec.") for error in parsed)


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": 5},
        {"suspend": True},
        {"service": {"port": 8080}},
        {"disruption": {"podDisruptionBudget": "Off"}},
        {"rollout": {"maxSurge": 3, "minReadySeconds": 1}},
        {"engine": {"port": 10210, "hydragen": True}},
        {"startup": {"timeoutSeconds": 1800}},
        {"parallelism": {"data": 1}},
        {"parallelism": {"tensor": 1, "pipeline": 1, "data": 1}},
        {"scheduling": {}},
        {"scheduling": {"patienceSeconds": 10}},
        {"rollout": {"stuckSeconds": 10, "drainDelaySeconds": 5}},
    ],
)
def test_what_does_not_alter_the_pod_makes_no_revision(change: dict[str, Any]) -> None:
    assert valid(**change).revision == valid().revision


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"source": "builtin://smollm2", "servedName": "x"}},
        {"engine": {"image": "engine:2"}},
        {"engine": {"env": [{"name": "A", "value": "b"}]}},
        {"resources": {"device": "cpu"}},
        {"parallelism": {"data": 2}},
        {"parallelism": {"tensor": 2}},
        {"parallelism": {"pipeline": 2}},
        {"parallelism": {"minimumData": 1}},
        {"parallelism": {"tensor": 2, "asyncTensorThreshold": 4096}},
        {"rollout": {"drainTimeoutSeconds": 1}},
        {"rollout": {"drainDelaySeconds": 8}},
        {"startup": {"timeoutSeconds": 60}},
        {"auth": {"hfTokenSecretRef": {"name": "hf"}}},
        {"podTemplate": {"labels": {"a": "b"}}},
        {"cache": {"size": "1Gi"}},
        {"scheduling": {"topologySpread": []}},
    ],
)
def test_what_alters_the_pod_makes_a_revision(change: dict[str, Any]) -> None:
    assert valid(**change).revision != valid().revision
