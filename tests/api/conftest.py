"""Fixtures of the API tests: real engines on the CPU with SmolLM2-135M, and the openai SDK in front of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from tokenizers import Tokenizer

from tests.api.reference import PROMPTS, find_model, greedy_answers
from tests.conftest import NUM_THREADS
from tests.engine_process import EngineProcess
from tests.model.conftest import TINY

CPU = ("device=cpu", "drain_endpoint_delay_s=0", "served_model_name=m", f"num_threads={NUM_THREADS}")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return find_model()


@pytest.fixture(scope="session")
def tiny(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model under the embedded one's tokenizer: thousands of tokens a second."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    torch.manual_seed(7)
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": 49152, "max_position_embeddings": 512})
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    for path in model_dir.glob("*token*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def expected(model_dir: Path) -> Callable[[int], list[str]]:
    """expected(num_tokens): so many tokens of transformers after each of PROMPTS, as text that the API would write."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    answers = greedy_answers(model_dir, PROMPTS)
    return lambda num_tokens: [tokenizer.decode(ids[:num_tokens], skip_special_tokens=True) for ids in answers]


@contextmanager
def running_engine(folder: Path, *arguments: str) -> Iterator[EngineProcess]:
    with EngineProcess(folder, *CPU, *arguments) as engine:
        engine.wait_ready()
        yield engine


@pytest.fixture(scope="session")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One engine in fp32 with everything on, shared by the tests that do no harm to it."""
    folder = tmp_path_factory.mktemp("engine")
    arguments = ("dtype=float32", "kv_cache_num_tokens=(32 * 1024)", "hydragen_min_prefix_len=64", "data_dir=data")
    with running_engine(folder, f"model={model_dir}", *arguments) as engine:
        yield engine


def client_of(engine: EngineProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=240.0)


@pytest.fixture
def client(engine: EngineProcess) -> Iterator[openai.OpenAI]:
    with client_of(engine) as client:
        yield client


@pytest.fixture
async def async_client(engine: EngineProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=240.0) as client:
        yield client


def read_metrics(engine: EngineProcess) -> dict[str, float]:
    """Every sample without labels of /metrics, by name."""
    text = engine.read("/metrics")
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}
