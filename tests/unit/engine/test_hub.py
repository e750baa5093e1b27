"""`toka-download` against a local server that speaks the hub's API."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toka_engine.errors import ExitCode, StorageError
from toka_engine.hub import check_space

from tests.engine_process import ROOT, EngineProcess, is_alive
from tests.unit.engine.hub_server import HubServer

WEIGHTS = random.Random(0).randbytes(24_000_000)
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[:1000],
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"raise SystemExit",
    "consolidated.safetensors": WEIGHTS,
    "onnx/config.json": b"{}",
}
WANTED = {
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer("org/tiny", dict(FILES)) as server:
        yield server


def download(home: Path, hub: HubServer, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_python(home, hub, "-m", "toka_engine.scripts.download", *(arguments or ("model=org/tiny",)), **env)


def run_python(home: Path, hub: HubServer, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **clean,
            "PYTHONPATH": str(ROOT / "engine"),
            "HF_HOME": str(home),
            "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1",
            **env,
        },
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )


def folder_of(result: subprocess.CompletedProcess[str]) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def assert_whole(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: FILES[name] for name in WANTED}


def test_a_download_fetches_weights_json_and_templates_and_nothing_else(hub: HubServer, tmp_path: Path) -> None:
    result = download(tmp_path, hub)
    assert_whole(folder_of(result))
    assert set(hub.fetched) == WANTED
    assert "0 of 24.00 MB" in result.stderr
    assert "MB/s" in result.stderr


def test_a_download_cut_half_way_goes_on_where_it_was_and_is_whole(hub: HubServer, tmp_path: Path) -> None:
    hub.cuts["model-00001-of-00002.safetensors"] = [15_000_000, 12_000_000]
    assert_whole(folder_of(download(tmp_path, hub)))
    resumed = [header for name, header in hub.ranges if name == "model-00001-of-00002.safetensors"]
    starts = [int(header.removeprefix("bytes=").rstrip("-")) for header in resumed]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] < len(WEIGHTS)


def test_a_hub_in_trouble_is_asked_again(hub: HubServer, tmp_path: Path) -> None:
    hub.statuses = [503]
    result = download(tmp_path, hub)
    assert_whole(folder_of(result))


UNREACHABLE = {
    "in trouble": ([503] * 100, "HF_ENDPOINT", "the hub answers 503"),
    "of no use": ([418] * 100, "HF_ENDPOINT", "the hub answers 418"),
    "away": ([], "NOWHERE", "the hub cannot be reached"),
}


@pytest.mark.parametrize("hub_is", UNREACHABLE)
def test_a_hub_that_gives_no_answer_in_the_end_is_unavailable_not_the_model_absent(
    hub: HubServer, tmp_path: Path, hub_is: str
) -> None:
    hub.statuses, endpoint, words = UNREACHABLE[hub_is]
    url = hub.url if endpoint == "HF_ENDPOINT" else "http://127.0.0.1:1"
    program = "import sys; from toka_engine import hub; hub._FIRST_PAUSE_S = 0.01\n" + (
        "from toka_engine.scripts.download import run; sys.exit(run(['model=org/tiny']))"
    )
    result = run_python(tmp_path, hub, "-c", program, HF_ENDPOINT=url)
    assert result.returncode == ExitCode.HUB_UNAVAILABLE, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("toka-download: HubUnavailable: ")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_second_download_fetches_nothing(hub: HubServer, tmp_path: Path) -> None:
    first = folder_of(download(tmp_path, hub))
    hub.fetched.clear()
    assert folder_of(download(tmp_path, hub)) == first
    assert hub.fetched == []


def test_a_whole_cache_is_enough_without_a_hub(hub: HubServer, tmp_path: Path) -> None:
    first = folder_of(download(tmp_path, hub))
    assert folder_of(download(tmp_path, hub, HF_HUB_OFFLINE="1")) == first


def test_offline_without_a_cache_is_not_found(hub: HubServer, tmp_path: Path) -> None:
    result = download(tmp_path, hub, HF_HUB_OFFLINE="1")
    assert result.returncode == ExitCode.MODEL_NOT_FOUND
    assert "HF_HUB_OFFLINE" in result.stderr


def test_a_model_behind_a_token_needs_hf_token(hub: HubServer, tmp_path: Path) -> None:
    hub.token = "secret-token"
    refused = download(tmp_path, hub)
    assert refused.returncode == ExitCode.MODEL_AUTH_FAILED
    assert "no HF_TOKEN is set" in refused.stderr
    wrong = download(tmp_path, hub, HF_TOKEN="wrong-token")
    assert wrong.returncode == ExitCode.MODEL_AUTH_FAILED
    assert "HF_TOKEN was refused" in wrong.stderr
    assert "wrong-token" not in wrong.stderr + wrong.stdout
    assert_whole(folder_of(download(tmp_path, hub, HF_TOKEN="secret-token")))


@pytest.mark.parametrize("argument", ["model=org/absent", "model=absent"])
def test_an_unknown_model_is_not_found(hub: HubServer, tmp_path: Path, argument: str) -> None:
    result = download(tmp_path, hub, argument)
    assert result.returncode == ExitCode.MODEL_NOT_FOUND, result.stderr
    assert argument.partition("=")[2] in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_revision_is_not_found_and_named(hub: HubServer, tmp_path: Path) -> None:
    result = download(tmp_path, hub, "model=org/tiny", "revision=absent")
    assert result.returncode == ExitCode.MODEL_NOT_FOUND, result.stderr
    assert "'absent'" in result.stderr


def test_a_repository_without_safetensors_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    result = download(tmp_path, hub)
    assert result.returncode == ExitCode.MODEL_INVALID
    assert "no *.safetensors" in result.stderr


@pytest.mark.parametrize("name", ["https://elsewhere/x", "a/b/c", "org/..", "a b", "builtin://other", "/nowhere"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    result = download(tmp_path, hub, f"model={name}")
    assert result.returncode in (ExitCode.CONFIG_INVALID, ExitCode.MODEL_NOT_FOUND)
    assert "Traceback" not in result.stderr
    assert hub.fetched == []


def test_a_cache_that_cannot_be_written_is_a_storage_failure(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = download(tmp_path, hub, HF_HOME=str(tmp_path / "file" / "home"))
    assert result.returncode == ExitCode.STORAGE_FAILED, result.stderr


def test_a_download_larger_than_the_disk_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the download takes"):
        check_space(10**18, tmp_path / "not" / "there" / "yet")


def engine_of(folder: Path, hub: HubServer, model: str) -> EngineProcess:
    env = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    return EngineProcess(folder, f"model={model}", module="tests.unit.engine.standins.engine", env=env)


def test_an_engine_downloads_its_model_visibly_and_then_starts(hub: HubServer, tmp_path: Path) -> None:
    with engine_of(tmp_path, hub, "org/tiny") as engine:
        engine.wait_ready()
        assert "process=resolve phase=download detail='0 of 24.00 MB'" in engine.log
        assert "MB/s" in engine.log
        assert engine.children.keys() == {"resolve", "server", "manager", "model"}
        assert not is_alive(engine.children["resolve"])


def test_an_engine_whose_model_is_not_on_the_hub_starts_nothing(hub: HubServer, tmp_path: Path) -> None:
    with engine_of(tmp_path, hub, "org/absent") as engine:
        assert engine.wait_end() == ExitCode.MODEL_NOT_FOUND
        assert engine.last_words() == "ModelNotFound: the hub has no model org/absent"
        assert engine.children.keys() == {"resolve"}


def test_an_engine_told_to_end_while_it_downloads_ends_with_zero(hub: HubServer, tmp_path: Path) -> None:
    hub.statuses = [503] * 100
    with engine_of(tmp_path, hub, "org/tiny") as engine:
        engine.wait_for_log("attempt 1 of")
        engine.signal(signal.SIGTERM)
        assert engine.wait_end() == ExitCode.OK
        assert not is_alive(engine.children["resolve"])


def test_a_hub_process_that_is_killed_ends_the_engine(hub: HubServer, tmp_path: Path) -> None:
    hub.statuses = [503] * 100
    with engine_of(tmp_path, hub, "org/tiny") as engine:
        engine.wait_for_log("attempt 1 of")
        engine.signal(signal.SIGKILL, "resolve")
        assert engine.wait_end() == ExitCode.PROCESS_DIED
        assert engine.last_words() == "EngineProcessDied: resolve was ended by SIGKILL"
