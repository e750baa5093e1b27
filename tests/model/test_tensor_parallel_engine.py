"""`toka tp_size=2`, and `pp_size=2`, on a CPU: model workers say what one model says, listen to nobody else, and end
together.
"""

from __future__ import annotations

import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from toka_engine.errors import ExitCode
from tokenizers import Tokenizer

from tests.engine_process import EngineProcess, is_alive

NUM_TOKENS = 12
PROMPT = "Two ranks say what one says."
RANKS = ["model_tp0", "model_tp1"]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The engine's TMPDIR."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def start(folder: Path, temporary: Path, *settings: str, size: str = "tp_size=2") -> EngineProcess:
    common = (f"model={folder}", "device=cpu", "dtype=float32", "kv_cache_num_tokens=4096", "num_threads=1")
    return EngineProcess(temporary.parent, *common, size, *settings, env={"TMPDIR": str(temporary)})


def listening_addresses(engine: EngineProcess) -> Iterator[tuple[str, str]]:
    """(process, address) of what listens, but for the server."""
    for name, pid in [("supervisor", engine.pid), *engine.children.items()]:
        for connection in psutil.Process(pid).net_connections("inet"):
            if name != "server" and (connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"):
                yield name, connection.laddr.ip


def test_two_ranks_serve_what_one_model_says_and_end_together(
    make_tiny: Callable[..., tuple[Any, Path]], smollm2: Path, temporary: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    model, folder = make_tiny("Qwen2", vocab_size=49152)
    shutil.copy(smollm2 / "tokenizer.json", folder)
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    model.generation_config.eos_token_id = None
    expected = tokenizer.decode(
        model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    )
    with start(folder, temporary) as engine:
        engine.wait_for_log("process=model_tp0 phase=load")
        [rendezvous] = temporary.glob("toka-ranks-*")
        assert stat.S_IMODE(rendezvous.stat().st_mode) == 0o700
        engine.wait_ready()
        assert [name for name in engine.children if name.startswith("model")] == RANKS
        assert not rendezvous.exists(), "nobody needs it any more"
        assert set(listening_addresses(engine)) == {(name, "127.0.0.1") for name in RANKS}
        client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=120.0)

        def complete(**fields: Any) -> list[str]:
            answer = client.completions.create(
                model=folder.name, prompt=PROMPT, max_tokens=NUM_TOKENS, extra_body={"ignore_eos": True}, **fields
            )
            return [choice.text for choice in answer.choices]

        assert complete(temperature=0, n=2) == [expected] * 2
        assert complete(seed=7, n=3) == complete(seed=7, n=3)
        engine.signal(signal.SIGKILL, RANKS[1])
        assert engine.wait_end() == ExitCode.PROCESS_DIED
        assert RANKS[1] in engine.last_words()
        assert not any(is_alive(pid) for pid in engine.children.values())


def test_two_stages_serve_what_one_model_says_listen_to_nobody_and_end_together(
    make_tiny: Callable[..., tuple[Any, Path]], smollm2: Path, temporary: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    model, folder = make_tiny("Qwen2", vocab_size=49152, num_hidden_layers=3, tie_word_embeddings=True)
    shutil.copy(smollm2 / "tokenizer.json", folder)
    model.generation_config.eos_token_id = None
    prompts = [PROMPT, "One", "The lanes of a pipeline take turns, so each stage has a step of its own. " * 3]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        found = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        expected.append(tokenizer.decode(found[0, ids.shape[1] :].tolist()))
    with start(folder, temporary, size="pp_size=2") as engine:
        engine.wait_ready()
        assert [name for name in engine.children if name.startswith("model")] == ["model_pp0", "model_pp1"]
        assert not list(temporary.iterdir()), "stages need no folder to meet in"
        assert set(listening_addresses(engine)) == set()
        with (
            openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=120.0) as client,
            ThreadPoolExecutor(len(prompts)) as pool,
        ):

            def complete(prompt: str, **fields: Any) -> list[str]:
                answer = client.completions.create(
                    model=folder.name, prompt=prompt, max_tokens=NUM_TOKENS, extra_body={"ignore_eos": True}, **fields
                )
                return [choice.text for choice in answer.choices]

            assert list(pool.map(lambda prompt: complete(prompt, temperature=0, n=2), prompts)) == [
                [text] * 2 for text in expected
            ]
            seeded = complete(PROMPT, seed=7, n=3)
            among_others = pool.map(lambda prompt: complete(prompt, seed=7, n=3), [PROMPT, "One", PROMPT])
            assert list(among_others)[::2] == [seeded] * 2
        engine.signal(signal.SIGKILL, "model_pp0")
        assert engine.wait_end() == ExitCode.PROCESS_DIED
        assert "model_pp0" in engine.last_words()
        assert not any(is_alive(pid) for pid in engine.children.values())


def test_replicas_of_two_ranks_say_the_same_and_a_stopped_rank_is_named(
    make_tiny: Callable[..., tuple[Any, Path]], smollm2: Path, temporary: Path
) -> None:
    _, folder = make_tiny("Qwen3", vocab_size=49152, head_dim=32)
    shutil.copy(smollm2 / "tokenizer.json", folder)
    with start(folder, temporary, "dp_size=2") as engine:
        engine.wait_ready()
        models = {f"model_dp{replica}_tp{rank}" for replica in (0, 1) for rank in (0, 1)}
        assert {name for name in engine.children if name.startswith("model")} == models
        client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=120.0)
        answers = [
            client.completions.create(model=folder.name, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, n=2)
            for _ in range(3)
        ]
        assert len({choice.text for answer in answers for choice in answer.choices}) == 1
        engine.signal(signal.SIGSTOP, "model_dp1_tp1")
        assert engine.wait_end() == ExitCode.PROCESS_STALLED
        assert "model_dp1_tp1" in engine.last_words()
    assert not list(temporary.iterdir())


def test_a_model_that_cannot_be_split_is_refused_by_both_numbers(smollm2: Path, temporary: Path) -> None:
    with start(smollm2, temporary) as engine:
        assert engine.wait_end() == ExitCode.CONFIG_INVALID
        assert "num_attention_heads=9 cannot be split over tp_size=2" in engine.last_words()
    assert not list(temporary.iterdir())
