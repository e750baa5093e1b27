"""Sampling parameters that a model's generation_config.json sets: applied, overridden, shown, refused, left out."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toka_engine.control_messages import Failed
from toka_engine.errors import ExitCode
from toka_engine.slot_parameters import Sampling

from tests.marks import rest_is_slow
from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import MODEL, RunningServer, running_server, speak

OWN = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
IGNORED = {"max_new_tokens": 3, "max_length": 5, "do_sample": True, "eos_token_id": 2, "transformers_version": "5.0"}
OFF = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def make_folder(tokenizer_dir: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(tokenizer_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def own(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tokenizer_dir, tmp_path_factory.mktemp("own") / "model", **OWN, **IGNORED)


@pytest.fixture(scope="module")
def opinionated(own: Path) -> Iterator[RunningServer]:
    with running_server(own, served_model_name=MODEL) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, [100] * 40)
        yield server


def sampled_with(server: RunningServer, path: str, body: dict[str, Any]) -> Sampling:
    status, answer = server.post(path, body)
    assert status == 200, answer
    return server.manager.submits[-1].sampling


def values_of(sampling: Sampling) -> dict[str, float]:
    return {name: getattr(sampling, name) for name in OFF}


@pytest.mark.parametrize("body", [completion_body(), chat_body(max_tokens=8)], ids=["completions", "chat"])
def test_fields_that_a_request_leaves_out_are_the_models_own(opinionated: RunningServer, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    assert values_of(sampled_with(opinionated, path, body)) == OWN
    assert values_of(sampled_with(opinionated, path, body | dict.fromkeys(OWN))) == OWN  # null is left out, too


@pytest.mark.parametrize("field", OWN)
def test_a_field_of_a_request_overrides_the_models_and_no_other(opinionated: RunningServer, field: str) -> None:
    sampling = sampled_with(opinionated, "/v1/completions", completion_body(**{field: OFF[field]}))
    assert values_of(sampling) == {**OWN, field: OFF[field]}


def test_the_models_example_length_cuts_no_answer(opinionated: RunningServer) -> None:
    sampled_with(opinionated, "/v1/chat/completions", chat_body())
    assert opinionated.manager.submits[-1].max_tokens > 1000


def test_the_defaults_are_shown_with_the_model(opinionated: RunningServer) -> None:
    _, _, answer = opinionated.request("GET", "/v1/models")
    assert json.loads(answer)["data"][0]["default_sampling_params"] == OWN
    _, _, answer = opinionated.request("GET", f"/v1/models/{MODEL}")
    assert json.loads(answer)["default_sampling_params"] == OWN


def test_a_model_without_opinions_is_sampled_as_openais_api_does(server: RunningServer) -> None:
    assert values_of(sampled_with(server, "/v1/completions", completion_body())) == OFF
    _, _, answer = server.request("GET", "/v1/models")
    assert json.loads(answer)["data"][0]["default_sampling_params"] == OFF


def test_generation_config_none_leaves_the_models_values_out(own: Path) -> None:
    with running_server(own, served_model_name=MODEL, generation_config="none", stderr=subprocess.PIPE) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, [100])
        assert values_of(sampled_with(server, "/v1/completions", completion_body())) == OFF
        server.process.kill()
        assert b"event=sampling_defaults generation_config=none temperature=1 " in server.process.stderr.read()


def test_the_log_states_the_defaults_at_the_start(tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = make_folder(tokenizer_dir, tmp_path / "model", temperature=0, top_k=10**6)
    with running_server(folder, served_model_name=MODEL, stderr=subprocess.PIPE) as server:
        server.process.kill()
        log = server.process.stderr.read().decode()
    stated = "temperature=0 top_p=1 top_k=49152 min_p=0 repetition_penalty=1"
    assert f"event=sampling_defaults generation_config=model {stated}" in log


@pytest.mark.parametrize(
    ("field", "value"),
    rest_is_slow(
        [("top_p", "0.9")],
        [("temperature", 2.5), ("top_p", "0.9"), ("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0)],
    ),
)
def test_a_value_that_no_request_could_have_ends_the_start_with_its_name(
    tokenizer_dir: Path, tmp_path: Path, field: str, value: Any
) -> None:
    folder = make_folder(tokenizer_dir, tmp_path / "model", **{field: value})
    with running_server(folder, sends_info=False) as server:
        fatal = server.wait_control(Failed)
    assert fatal.exit_code == ExitCode.MODEL_INVALID
    assert f"$.{field}" in fatal.message
    assert "generation_config=none" in fatal.message
