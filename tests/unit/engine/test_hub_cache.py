"""One download per cache: locked, resumed after SIGKILL, checked by its hash, seen in /readyz, gentle to the hub."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from toka_engine.errors import ExitCode
from toka_engine.hub.cache import Attempts, ModelCache
from toka_engine.hub.failures import TransientError, translated_errors

from tests.engine_process import ROOT, EngineProcess
from tests.unit.engine.hub_server import HubServer

WEIGHTS = random.Random(1).randbytes(40_000_000)
LARGE = "model.safetensors"
FILES = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": b"{}", LARGE: WEIGHTS}
NUM_BYTES = sum(map(len, FILES.values()))
LIMIT_S = 120.0
"""It only ends a hang."""
_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer("org/tiny", dict(FILES)) as server:
        yield server


@pytest.fixture(autouse=True)
def no_settings_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_downloads_left_behind(hub: HubServer) -> Iterator[None]:
    yield
    for process in _STARTED:
        process.kill()
        process.communicate()
    _STARTED.clear()


def environment(home: Path, hub: HubServer) -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT / "engine"), "HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **ours, "HF_HUB_DOWNLOAD_TIMEOUT": f"{LIMIT_S:.0f}"}  # a hub that holds is no hub that hangs


def start(home: Path, hub: HubServer, program: str = "") -> subprocess.Popen[str]:
    """`toka-download` of the model, after the lines of `program`."""
    call = "import sys; from toka_engine.scripts.download import run; sys.exit(run(['model=org/tiny']))"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}\n{call}"],
        env=environment(home, hub),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a download that must succeed; return what it wrote to stderr."""
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert {path.name: path.read_bytes() for path in Path(out.strip()).iterdir()} == FILES
    return err


def wait_for(predicate: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not predicate():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def parts_of(home: Path) -> list[Path]:
    return list(home.glob("hub/models--org--tiny/blobs/*.part"))


def test_four_engines_with_one_cache_fetch_the_model_once(hub: HubServer, tmp_path: Path) -> None:
    hub.holds[LARGE] = len(WEIGHTS) // 2
    first = start(tmp_path, hub)
    assert hub.is_holding.wait(LIMIT_S)
    others = [start(tmp_path, hub) for _ in range(3)]
    for other in others:
        assert other.stderr is not None
        assert "another engine downloads into this cache" in other.stderr.readline() + other.stderr.readline()
    assert not list(tmp_path.glob(f"hub/models--org--tiny/snapshots/*/{LARGE}")), "a name before all bytes"
    hub.let_go.set()
    for process in (first, *others):
        finish(process)
    assert hub.num_bytes_sent <= 1.1 * NUM_BYTES
    assert sorted(hub.fetched) == sorted(FILES)


def test_a_download_killed_half_way_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    hub.holds[LARGE] = len(WEIGHTS) // 2
    killed = start(tmp_path, hub)
    wait_for(lambda: any(part.stat().st_size >= 10_000_000 for part in parts_of(tmp_path)), "bytes on the disk")
    killed.kill()
    killed.communicate()
    (part,) = parts_of(tmp_path)
    num_kept = part.stat().st_size
    hub.let_go.set()
    log = finish(start(tmp_path, hub))
    assert hub.ranges == [(LARGE, f"bytes={num_kept}-")]
    assert f"download: {num_kept / 1e6:.2f} MB of {NUM_BYTES / 1e6:.2f} MB" in log
    assert parts_of(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_download_that_is_told_to_end_does_so_amid_its_bytes(
    hub: HubServer, tmp_path: Path, signum: signal.Signals
) -> None:
    hub.holds[LARGE] = len(WEIGHTS) // 2
    command = [sys.executable, "-m", "toka_engine.scripts.download", "model=org/tiny"]
    with subprocess.Popen(command, env=environment(tmp_path, hub), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert hub.is_holding.wait(LIMIT_S)
            process.send_signal(signum)
            _, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    assert process.returncode == 128 + signum
    assert "Traceback" not in err
    assert not hub.let_go.is_set()


def test_bytes_that_are_not_what_the_hub_lists_are_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.holds[LARGE] = len(WEIGHTS) // 2
    killed = start(tmp_path, hub)
    wait_for(lambda: any(part.stat().st_size >= 10_000_000 for part in parts_of(tmp_path)), "bytes on the disk")
    killed.kill()
    killed.communicate()
    hub.let_go.set()
    (part,) = parts_of(tmp_path)
    with part.open("r+b") as stream:
        stream.write(b"rotten")
    log = finish(start(tmp_path, hub, "from toka_engine import hub; hub._FIRST_PAUSE_S = 0.01"))
    assert f"{LARGE} has another hash than the hub says" in log


def test_a_hub_that_asks_for_patience_gets_it() -> None:
    response = SimpleNamespace(status_code=429, headers={"Retry-After": "7"}, request=None)
    with pytest.raises(TransientError, match="the hub answers 429") as raised, translated_errors("org/tiny", None):
        raise HfHubHTTPError("too many", response=response)  # type: ignore[arg-type]
    assert raised.value.retry_after_s == 7.0


@pytest.mark.slow
def test_restarts_wait_ever_longer_before_they_ask_a_hub_that_is_away(hub: HubServer, tmp_path: Path) -> None:
    hub.statuses = [503] * 1000
    pauses = "cache._FIRST_BACKOFF_S = cache._MAX_BACKOFF_S = 3600.0"  # not over before the next start
    online = "import os; os.environ['HF_HUB_OFFLINE'] = '0'"
    asleep = f"import time; time.sleep = lambda s: None\nfrom toka_engine.hub import cache; {pauses}\n{online}"
    for number in range(2):
        process = start(tmp_path, hub, asleep)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == ExitCode.HUB_UNAVAILABLE, err
        assert ("the hub gave no answer, 1 starts in a row; again in" in err) is (number == 1)
    hub.statuses = []
    assert "the hub gave no answer, 2 starts in a row; again in" in finish(start(tmp_path, hub, asleep))
    assert ModelCache(tmp_path / "hub", "models--org--tiny").read_attempts() == Attempts()


def test_the_pause_between_starts_doubles_up_to_five_minutes() -> None:
    pauses = [Attempts(number, 1000.0).pause_s(1000.0) for number in range(8)]
    assert pauses == [0.0, 15.0, 30.0, 60.0, 120.0, 240.0, 300.0, 300.0]
    assert Attempts(1, 1000.0).pause_s(1016.0) == 0.0
    assert Attempts(1, 9000.0).pause_s(1000.0) == 15.0  # noted by a node whose clock is ahead


def engine_of(folder: Path, hub: HubServer) -> EngineProcess:
    env = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    env["HF_HUB_DOWNLOAD_TIMEOUT"] = f"{LIMIT_S:.0f}"
    return EngineProcess(folder, "model=org/tiny", module="tests.unit.engine.standins.engine", env=env)


def ask(url: str, body: bytes | None = None) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url, data=body)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_engine_that_downloads_says_so_by_http_and_an_engine_that_restarts_asks_nothing(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.holds[LARGE] = len(WEIGHTS) // 2
    with engine_of(tmp_path, hub) as engine:
        assert hub.is_holding.wait(LIMIT_S)
        half = f"MB of {NUM_BYTES / 1e6:.2f} MB"
        wait_for(lambda: half in str(ask(f"{engine.url}/readyz")[1].get("detail")), "the bytes in /readyz")
        status, readiness = ask(f"{engine.url}/readyz")
        assert (status, readiness["ready"], readiness["phase"]) == (503, False, "starting")
        download = readiness["download"]
        assert isinstance(download, dict)
        assert download["total_bytes"] == NUM_BYTES
        assert 0 <= download["bytes"] <= len(WEIGHTS) // 2 + 1000
        assert ask(f"{engine.url}/livez") == (200, {"alive": True})
        status, refusal = ask(f"{engine.url}/v1/completions", b'{"prompt": "x"}')
        assert status == 503
        error = refusal["error"]
        assert isinstance(error, dict)
        assert error["code"] == "unavailable"
        assert "starting: download" in str(error["message"])
        hub.let_go.set()
        engine.wait_ready()
    hub.num_questions = hub.num_bytes_sent = 0
    with engine_of(tmp_path, hub) as engine:
        engine.wait_ready()
    assert (hub.num_questions, hub.num_bytes_sent) == (0, 0)
