"""The processes of a working engine: their memory, what they load, what listens, and `toka-ping` in front of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.api.conftest import client_of, running_engine
from tests.engine_process import ROOT, EngineProcess

SERVER_BYTES = 150_000_000
ALL_BYTES = 2_000_000_000


@pytest.fixture(scope="module")
def default_engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that was given no setting that sizes it, after some work."""
    with running_engine(tmp_path_factory.mktemp("default"), f"model={model_dir}") as engine:
        with client_of(engine) as client, ThreadPoolExecutor(16) as pool:

            def ask(number: int) -> None:
                client.completions.create(model="m", prompt=f"{number} is a number. " * 20, n=2, max_tokens=16)

            list(pool.map(ask, range(16)))
        yield engine


def test_the_server_stays_below_150_megabytes(default_engine: EngineProcess) -> None:
    assert psutil.Process(default_engine.children["server"]).memory_info().rss <= SERVER_BYTES


def test_all_processes_together_stay_below_two_gigabytes(default_engine: EngineProcess) -> None:
    pids = [default_engine.pid, *default_engine.children.values()]
    # Pages that several processes share count once (proportional set size).
    assert sum(psutil.Process(pid).memory_full_info().pss for pid in pids) <= ALL_BYTES


@pytest.mark.parametrize("process", ["server", "manager"])
def test_only_the_model_worker_loads_torch(default_engine: EngineProcess, process: str) -> None:
    maps = Path(f"/proc/{default_engine.children[process]}/maps").read_text()
    assert "torch" not in maps
    assert "torch" in Path(f"/proc/{default_engine.children['model']}/maps").read_text()


def test_nothing_listens_but_the_one_port_of_the_server(default_engine: EngineProcess) -> None:
    listening = {
        (name, connection.laddr.port)
        for name, pid in [("supervisor", default_engine.pid), *default_engine.children.items()]
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"
    }
    assert listening == {("server", default_engine.port)}


def ping(engine: EngineProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toka_engine.scripts.ping", f"port={engine.port}", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "engine")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_toka_ping_prints_the_answer(engine: EngineProcess) -> None:
    result = ping(engine, "prompt=What is the capital of France?", "max_tokens=20", "chat=True")
    assert result.stdout == "The capital of France is Paris.\n", result.stderr
    assert result.returncode == 0


def test_toka_ping_continues_a_text(engine: EngineProcess) -> None:
    assert ping(engine, "prompt=1, 2, 3,", "max_tokens=6", "chat=F").stdout == " 4, 5,\n"


def test_toka_ping_tells_what_the_server_refused(engine: EngineProcess) -> None:
    result = ping(engine, "model=another")
    assert result.returncode == 1
    assert "404" in result.stderr
    assert "another" in result.stderr


def test_toka_ping_without_a_server_fails_in_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "toka_engine.scripts.ping", "port=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "engine")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1


def test_toka_download_of_the_embedded_model_prints_its_folder() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "toka_engine.scripts.download", "model=builtin://smollm2"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "engine")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.removesuffix("\n"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_an_engine_with_a_key_serves_only_those_who_have_it(model_dir: Path, tmp_path: Path) -> None:
    with EngineProcess(tmp_path, f"model={model_dir}", "device=cpu", env={"TOKA_API_KEY": "k-5"}) as engine:
        engine.wait_ready()
        assert engine.get("/readyz") == 200
        assert engine.get("/v1/models") == 401
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "engine"), "TOKA_API_KEY": "k-5"}
        result = subprocess.run(
            [sys.executable, "-m", "toka_engine.scripts.ping", f"port={engine.port}", "max_tokens=4"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert "k-5" not in engine.log
