"""Two files agree on what neither can import from the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from toka_engine.command_line import parse_config
from toka_engine.errors import REASONS
from toka_engine.hub import Transfer
from toka_engine.waiting_room import WaitingRoom
from toka_operator.downloads import parse_download
from toka_operator.errors import EXIT_REASONS
from toka_operator.observed import Download
from toka_operator.podspec import render_arguments

from tests.unit.operator.examples import valid

ROOT = Path(__file__).parents[3]


def test_the_operator_knows_the_engines_exit_codes() -> None:
    assert {int(code): reason for code, reason in REASONS.items()} == EXIT_REASONS


def test_the_operator_reads_the_download_that_an_engine_tells() -> None:
    room = WaitingRoom(None)
    room.note("download", "org/name")
    assert parse_download(json.dumps(room.answer("/readyz")[1]).encode()) is None
    room.note_transfer(Transfer(3_000, 10_000, 250.4))
    assert parse_download(json.dumps(room.answer("/readyz")[1]).encode()) == Download(3_000, 10_000, 250)


def test_the_chart_holds_the_crd() -> None:
    copy = ROOT / "charts" / "toka" / "files" / "tokadeployments.yaml"
    assert copy.read_text() == (ROOT / "crds" / "tokadeployments.yaml").read_text()


def test_the_engine_understands_every_argument_that_the_operator_gives() -> None:
    spec = valid(
        model={
            "source": "hf://a/b",
            "revision": "v1",
            "servedName": "m",
            "aliases": ["x", "y"],
            "tokenizer": "org/t",
            "dtype": "float32",
        },
        engine={
            "port": 9000,
            "maxTokensPerForward": 64,
            "maxSeqsPerForward": 8,
            "targetGapMs": 20,
            "kvCacheNumTokens": 1024,
            "pageSize": 32,
            "hydragen": False,
            "cudaGraphs": False,
            "logLevel": "DEBUG",
        },
        resources={"device": "cpu"},
        rollout={"drainTimeoutSeconds": 7},
    )
    config = parse_config(render_arguments(spec))
    assert (config.model, config.revision, config.served_model_name) == ("a/b", "v1", "m")
    assert (config.model_aliases, config.tokenizer, config.dtype) == (("x", "y"), "org/t", "float32")
    assert (config.device, config.port, config.log_level) == ("cpu", 9000, "DEBUG")
    assert (config.max_tokens_per_forward, config.max_seqs_per_forward) == (64, 8)
    assert (config.kv_cache_num_tokens, config.page_size) == (1024, 32)
    assert config.target_gap_ms == 20
    assert (config.use_hydragen, config.use_cudagraphs) == (False, False)
    assert (config.drain_timeout_s, config.drain_endpoint_delay_s) == (7, 5)


@pytest.mark.parametrize("limit", ["minimum", "maximum"])
def test_the_crds_bounds_of_engine_fields_are_accepted_by_the_engine(limit: str) -> None:
    crd = yaml.safe_load((ROOT / "crds" / "tokadeployments.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    fields = {n: f[limit] for n, f in schema["engine"]["properties"].items() if limit in f}
    assert fields
    parse_config(render_arguments(valid(engine=fields)))


def test_extra_arguments_may_not_set_a_key_that_the_operator_sets() -> None:
    crd = (ROOT / "crds" / "tokadeployments.yaml").read_text()
    owned = crd.split("self.split('=')[0] in [")[1].split("]")[0]
    spec = valid(
        model={"source": "hf://a/b", "revision": "main", "aliases": ["x"], "tokenizer": "t"},
        engine={
            "maxTokensPerForward": 1,
            "maxSeqsPerForward": 1,
            "targetGapMs": 1,
            "kvCacheNumTokens": 16,
            "pageSize": 1,
        },
    )
    keys = {argument.split("=")[0] for argument in render_arguments(spec)}
    assert keys <= set(yaml.safe_load(f"[{owned}]"))


def test_the_chart_grants_no_secrets_and_no_wildcards() -> None:
    rules = (ROOT / "charts" / "toka" / "templates" / "_helpers.tpl").read_text()
    assert "secrets" not in rules.replace("no secrets", "")
    assert "*" not in rules.replace("/*", "").replace("*/", "")
    assert "exec" not in rules.replace("no exec", "")
