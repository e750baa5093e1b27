"""Stock clients in environments of their own, as their own documentation says, against a real engine without flags.

Each client has the snippet of docs/clients.md, and a script under uses/ for what else its users do with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from toka_engine.builtin import ensure_builtin

from tests.clients.environments import CLIENTS, environment_of, pins_of
from tests.clients.languages import MissingToolError, language_of
from tests.conftest import NUM_THREADS
from tests.engine_process import ROOT, EngineProcess

_DOCUMENT = ROOT / "docs" / "clients.md"
_USES = Path(__file__).parent / "uses"
_TASKS = Path(__file__).parent / "tasks"
_TIMEOUT_S = 900.0
_SUFFIXES = {"python": ".py", "bash": ".sh", "javascript": ".mjs", "go": ".go", "java": ".java"}
_SNIPPETS = {
    name: (_SUFFIXES[fence], text)
    for name, fence, text in re.findall(
        r"^## [^\n]*\n<!-- client: (\w+) -->\n(?:(?!^## ).)*?^```(\w+)\n(.*?)^```$", _DOCUMENT.read_text(), re.M | re.S
    )
}
_URL = "http://localhost:10210"
_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "none",
    "DO_NOT_TRACK": "1",
    # aiperf's processes wait for each other so many seconds, of which a busy machine may need more than the default 30.
    "AIPERF_SERVICE_COMMAND_RESPONSE_TIMEOUT": "600",
    "AIPERF_SERVICE_REGISTRATION_TIMEOUT": "600",
    "AIPERF_SERVICE_START_TIMEOUT": "600",
}
"""No telemetry is sent, and no table of prices fetched."""
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "JAVA_HOME", "GOCACHE", "GOMODCACHE", "GOPATH")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine whose answers end in time, whatever the small model says, in the dtype that is compared with."""
    settings = (
        "device=cpu",
        "dtype=float32",
        "served_model_name=smollm2",
        "max_num_tokens_per_request=2048",
        f"num_threads={NUM_THREADS}",
    )
    with EngineProcess(tmp_path_factory.mktemp("engine"), "drain_endpoint_delay_s=0", *settings) as engine:
        engine.wait_ready()
        yield engine


def _run(name: str, script: Path, *arguments: str | Path) -> str:
    """Run a client's script in its folder. It sees nothing of this repository's environment, and no hub."""
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    # aiperf, told to be offline, takes the tokenizer's folder for the name of a repository.
    offline = {} if name == "aiperf" else {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*language_of(pins_of(name)).command(environment_of(name), script), *arguments],
        cwd=script.parent,
        env={**kept, **_QUIET, **offline},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def test_every_client_has_a_snippet_and_a_script() -> None:
    assert set(_SNIPPETS) == set(CLIENTS)
    expected = {f"use_{name}{language_of(pins_of(name)).suffix}" for name in CLIENTS}
    assert {path.name for path in _USES.glob("use_*.*")} == expected


@pytest.mark.parametrize("name", ["openai_go", "openai_java", "openai_node"], ids=["Go", "Java", "Node"])
def test_a_client_whose_tools_are_missing_fails_and_names_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingToolError, match=rf"The client {name} needs \w+( and \w+)* on PATH: "):
        environment_of(name)


@pytest.mark.timeout(2400)  # the environment may have to be made first
@pytest.mark.parametrize("name", CLIENTS)
def test_the_snippet_of_the_documentation_prints_an_answer(engine: EngineProcess, tmp_path: Path, name: str) -> None:
    suffix, text = _SNIPPETS[name]
    script = tmp_path / f"snippet{suffix}"
    script.write_text(text.replace(_URL, engine.url).replace(_HUB_NAME, str(ensure_builtin())))
    assert _run(name, script).strip()


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_works_in_its_default_configuration(engine: EngineProcess, tmp_path: Path, name: str) -> None:
    script = Path(shutil.copy(_USES / f"use_{name}{language_of(pins_of(name)).suffix}", tmp_path))
    shutil.copytree(_TASKS, tmp_path / "tasks")
    _run(name, script, engine.url, ensure_builtin())
