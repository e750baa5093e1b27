"""Two replicas behind one port: the answers of one process, from both, and each prompt where its prefix is cached."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.api.asking import complete_at_once
from tests.api.conftest import client_of, running_engine
from tests.api.reference import ONE_PAGE, PROMPTS
from tests.engine_process import EngineProcess

PAGE = 16


@pytest.fixture(scope="module")
def pair(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("pair")
    arguments = ("dp_size=2", "dtype=float32", "kv_cache_num_tokens=(16 * 1024)", "hydragen_min_prefix_len=64")
    with running_engine(folder, f"model={model_dir}", *arguments) as engine:
        yield engine


@pytest.fixture(scope="module")
def pair_client(pair: EngineProcess) -> Iterator[openai.OpenAI]:
    with client_of(pair) as client:
        yield client


def read_metrics(engine: EngineProcess) -> dict[str, float]:
    text = engine.read("/metrics")
    return {name: float(value) for name, value in re.findall(r"^([^# ]+) (\S+)$", text, re.MULTILINE)}


def prompts_of_each(engine: EngineProcess) -> list[float]:
    metrics = read_metrics(engine)
    return [metrics.get(f'toka_replica_prompt_tokens_total{{replica="{index}"}}', 0.0) for index in range(2)]


def test_the_processes_are_named_by_replica_and_one_port_listens(pair: EngineProcess) -> None:
    assert set(pair.children) == {"server", "manager_dp0", "manager_dp1", "model_dp0", "model_dp1"}
    listening = {
        (name, connection.laddr.port)
        for name, pid in [("supervisor", pair.pid), *pair.children.items()]
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"
    }
    assert listening == {("server", pair.port)}


def test_greedy_answers_are_those_of_the_reference_whichever_replica_gives_them(
    pair: EngineProcess, expected: Callable[[int], list[str]]
) -> None:
    for _ in range(2):
        assert complete_at_once(pair, ONE_PAGE) == expected(ONE_PAGE)
    assert all(prompts_of_each(pair))


def test_a_seed_gives_the_same_choices_as_in_one_process_also_where_replicas_share_them(
    pair_client: openai.OpenAI, client: openai.OpenAI, pair: EngineProcess
) -> None:
    def ask(one: openai.OpenAI, n: int) -> list[str]:
        answer = one.completions.create(model="m", prompt="The sea", max_tokens=5, n=n, seed=11, temperature=1.0)
        return [choice.text for choice in answer.choices]

    for n, num_replicas in ((3, 1), (140, 2)):
        before = prompts_of_each(pair)
        assert ask(pair_client, n) == ask(client, n)
        assert num_grown(pair, before, num_replicas) == num_replicas


def num_grown(engine: EngineProcess, before: list[float], at_least: int) -> int:
    """Replicas that have read prompt tokens since `before`. Each tells when it becomes idle, not both at one moment."""
    pause = threading.Event()
    for _ in range(200):
        is_idle = not read_metrics(engine)["toka_running"]
        num_grown = sum(now > then for now, then in zip(prompts_of_each(engine), before, strict=True))
        if is_idle and num_grown >= at_least:
            return num_grown
        pause.wait(0.05)
    raise AssertionError("no statistics came")


def test_each_prompt_goes_where_its_prefix_is_cached(pair: EngineProcess, pair_client: openai.OpenAI) -> None:
    before = read_metrics(pair)
    prefixes = [[5000 + 7 * group + index % 50 for index in range(20 * PAGE)] for group in range(4)]
    num_cached = 0
    for turn in range(4):
        for group, prefix in enumerate(prefixes):
            prompt: Any = [*prefix, 900 + turn, 950 + group]
            pair_client.completions.create(model="m", prompt=prompt, max_tokens=1)
            num_cached += 20 * PAGE if turn else 0
    metrics = read_metrics(pair)
    found = 'toka_router_cached_tokens_total{kind="found"}'
    assert metrics[found] - before[found] == num_cached
    assert metrics['toka_replica_outstanding_tokens{replica="0"}'] == 0
    assert metrics['toka_replica_outstanding_tokens{replica="1"}'] == 0


def test_replicas_sample_different_texts_where_no_seed_is_given(pair_client: openai.OpenAI) -> None:
    answer = pair_client.completions.create(model="m", prompt="Once", max_tokens=8, n=160, temperature=1.5)
    halves = [[choice.text for choice in answer.choices[begin : begin + 80]] for begin in (0, 80)]
    assert halves[0] != halves[1]


def test_a_prompts_logprobs_come_from_one_replica_however_many_its_choices(pair_client: openai.OpenAI) -> None:
    """The choices are so many that replicas share them otherwise."""
    answer = pair_client.completions.create(
        model="m", prompt=[PROMPTS[8], PROMPTS[9]], n=130, max_tokens=1, echo=True, logprobs=0, temperature=1.0
    )
    for prompt in (answer.choices[:130], answer.choices[130:]):
        found = [
            choice.logprobs.token_logprobs for choice in prompt if choice.logprobs and choice.logprobs.token_logprobs
        ]
        assert len(found) == 130
        assert all(each[0] is None and None not in each[1:] for each in found)
        num_prompt = min(map(len, found)) - 1
        assert len({tuple(each[:num_prompt]) for each in found}) == 1
