"""What two files must agree on, since neither can import the other."""

from __future__ import annotations

from pathlib import Path

import yaml
from toka_engine.config import EngineConfig
from toka_engine.errors import REASONS
from toka_operator.errors import EXIT_REASONS
from toka_operator.podspec import render_arguments

from tests.unit.operator.examples import valid

ROOT = Path(__file__).parents[3]


def test_the_operator_knows_the_engines_exit_codes() -> None:
    assert {int(code): reason for code, reason in REASONS.items()} == EXIT_REASONS


def test_the_chart_holds_the_crd() -> None:
    copy = ROOT / "charts" / "toka" / "files" / "tokadeployments.yaml"
    assert copy.read_text() == (ROOT / "crds" / "tokadeployments.yaml").read_text()


def test_every_argument_is_a_key_of_the_engine() -> None:
    spec = valid(
        model={"source": "hf://a/b", "revision": "main", "aliases": ["x"], "tokenizer": "t"},
        engine={"maxTokensPerForward": 1, "maxSeqsPerForward": 1, "kvCacheNumTokens": 16, "pageSize": 1},
    )
    keys = {argument.split("=")[0] for argument in render_arguments(spec)}
    assert keys <= set(EngineConfig.__struct_fields__)


def test_extra_arguments_may_not_set_a_key_that_the_operator_sets() -> None:
    crd = (ROOT / "crds" / "tokadeployments.yaml").read_text()
    owned = crd.split("self.split('=')[0] in [")[1].split("]")[0]
    spec = valid(
        model={"source": "hf://a/b", "revision": "main", "aliases": ["x"], "tokenizer": "t"},
        engine={"maxTokensPerForward": 1, "maxSeqsPerForward": 1, "kvCacheNumTokens": 16, "pageSize": 1},
    )
    keys = {argument.split("=")[0] for argument in render_arguments(spec)}
    assert keys <= set(yaml.safe_load(f"[{owned}]"))


def test_the_chart_grants_no_secrets_and_no_wildcards() -> None:
    rules = (ROOT / "charts" / "toka" / "templates" / "_helpers.tpl").read_text()
    assert "secrets" not in rules.replace("no secrets", "")
    assert "*" not in rules.replace("/*", "").replace("*/", "")
    assert "exec" not in rules.replace("no exec", "")
