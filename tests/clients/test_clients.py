"""Stock clients in environments of their own, as their own documentation says, against a real engine without flags.

Each client has the snippet of docs/clients.md, and a script under uses/ for what else its users do with it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import CLIENTS, python_of
from tests.conftest import NUM_THREADS
from tests.engine_process import ROOT, EngineProcess

_DOCUMENT = ROOT / "docs" / "clients.md"
_USES = Path(__file__).parent / "uses"
_TIMEOUT_S = 280.0
_SNIPPETS = dict(
    re.findall(r"^## [^\n]*\n<!-- client: (\w+) -->\n.*?^```python\n(.*?)^```$", _DOCUMENT.read_text(), re.M | re.S)
)
_URL = "http://localhost:10210"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine whose answers end in time, whatever the small model says."""
    settings = (
        "device=cpu",
        "served_model_name=smollm2",
        "max_num_tokens_per_request=2048",
        f"num_threads={NUM_THREADS}",
    )
    with EngineProcess(tmp_path_factory.mktemp("engine"), "drain_endpoint_delay_s=0", *settings) as engine:
        engine.wait_ready()
        yield engine


def _run(name: str, folder: Path, *arguments: str) -> str:
    """Run a script with a client's interpreter, which sees nothing of this repository's environment."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none", "DO_NOT_TRACK": "1"}
    result = subprocess.run(
        [python_of(name), *arguments],
        cwd=folder,
        env={**kept, **quiet},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def test_every_client_has_a_snippet_and_a_script() -> None:
    assert set(_SNIPPETS) == set(CLIENTS)
    assert {path.stem.removeprefix("use_") for path in _USES.glob("*.py")} == set(CLIENTS)


@pytest.mark.timeout(900)  # the environment may have to be made first
@pytest.mark.parametrize("name", CLIENTS)
def test_the_snippet_of_the_documentation_prints_an_answer(engine: EngineProcess, tmp_path: Path, name: str) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(_SNIPPETS[name].replace(_URL, engine.url))
    assert _run(name, tmp_path, str(script)).strip()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_works_in_its_default_configuration(engine: EngineProcess, tmp_path: Path, name: str) -> None:
    _run(name, tmp_path, str(_USES / f"use_{name}.py"), engine.url)
