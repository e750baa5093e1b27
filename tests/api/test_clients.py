"""The openai SDK, sync and async, against the real engine, without special flags."""

from __future__ import annotations

import asyncio
import json
import urllib.request

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.engine_process import EngineProcess

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


def test_models_lists_the_one_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").object == "model"


@pytest.mark.parametrize("path", ["/ping", "/livez", "/readyz", "/metrics"])
def test_the_health_endpoints_answer(engine: EngineProcess, path: str) -> None:
    assert engine.get(path) == 200


def test_a_chat_is_answered_from_the_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=QUESTION, temperature=0, max_tokens=30)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="m",
        messages=QUESTION,
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "The capital of France is Paris."
    assert sum(map(bool, pieces)) > 2
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    whole = client.chat.completions.create(model="m", messages=QUESTION, temperature=0, max_tokens=30)
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_stream_without_include_usage_carries_none(client: openai.OpenAI) -> None:
    for chunk in client.completions.create(model="m", prompt="Hi", max_tokens=4, stream=True):
        assert chunk.usage is None


def test_n_choices_are_all_there_and_counted(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="m", prompt="Once upon a time", n=6, max_tokens=12, temperature=1.0, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6 * 12


def test_n_greedy_choices_are_equal(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="m", prompt="Once upon a time", n=4, max_tokens=12, temperature=0)
    assert len({choice.text for choice in answer.choices}) == 1


def test_n_streamed_choices_come_under_their_indices(client: openai.OpenAI) -> None:
    texts = dict.fromkeys(range(3), "")
    for chunk in client.completions.create(
        model="m", prompt="The sea is", n=3, max_tokens=8, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert len(set(texts.values())) == 1
    assert texts[0]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model="m", prompt="1, 2, 3,", max_tokens=24, temperature=0)
    stopped = client.completions.create(model="m", prompt="1, 2, 3,", max_tokens=24, temperature=0, stop=" 6")
    assert " 6" in free.choices[0].text
    assert stopped.choices[0].text == free.choices[0].text.partition(" 6")[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert free.usage is not None
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens < free.usage.completion_tokens


def test_a_stop_string_never_appears_in_a_stream(client: openai.OpenAI) -> None:
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="m", prompt="1, 2, 3,", max_tokens=24, temperature=0, stop=[", 6", "zzz"], stream=True
        )
        if chunk.choices
    ]
    assert "".join(pieces) == " 4, 5"


def test_prompts_may_be_texts_ids_and_lists_of_both(client: openai.OpenAI, engine: EngineProcess) -> None:
    texts = client.completions.create(model="m", prompt=["The sky is", "The grass is"], max_tokens=6, temperature=0)
    assert [choice.index for choice in texts.choices] == [0, 1]
    alone = client.completions.create(model="m", prompt="The grass is", max_tokens=6, temperature=0)
    assert texts.choices[1].text == alone.choices[0].text
    ids = client.completions.create(model="m", prompt=[504, 6376, 314], max_tokens=6, temperature=0)
    lists = client.completions.create(model="m", prompt=[[504, 6376, 314], [504, 8135]], max_tokens=6, temperature=0)
    assert lists.choices[0].text == ids.choices[0].text
    assert len(lists.choices) == 2


def test_ignore_eos_goes_on_to_the_limit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=QUESTION, temperature=0, max_tokens=40, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_are_of_the_chosen_token_and_sorted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        tops = [top.logprob for top in token.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert token.logprob == pytest.approx(tops[0], abs=1e-4)
        assert token.logprob <= 1e-6


async def test_forty_async_requests_are_all_answered(async_client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(
            async_client.completions.create(model="m", prompt=f"Number {i} is", max_tokens=5 + i % 7, temperature=0)
            for i in range(40)
        )
    )
    assert all(answer.choices[0].finish_reason in ("length", "stop") for answer in answers)


async def test_async_streams_interleave_and_each_is_whole(async_client: openai.AsyncOpenAI) -> None:
    async def read(prompt: str) -> str:
        stream = await async_client.completions.create(
            model="m", prompt=prompt, max_tokens=10, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    prompts = ["The sky is", "The grass is", "The sea is", "The sky is"]
    streamed = await asyncio.gather(*map(read, prompts))
    for prompt, text in zip(prompts, streamed, strict=True):
        whole = await async_client.completions.create(model="m", prompt=prompt, max_tokens=10, temperature=0)
        assert text == whole.choices[0].text


async def test_a_seed_gives_the_same_text_whatever_else_runs(async_client: openai.AsyncOpenAI) -> None:
    async def ask(seed: int, n: int = 1) -> list[str]:
        answer = await async_client.completions.create(
            model="m", prompt="My favourite colour is", max_tokens=12, temperature=1.0, seed=seed, n=n
        )
        return [choice.text for choice in answer.choices]

    alone = [await ask(seed) for seed in (1, 2, 3)]
    assert len({text for texts in alone for text in texts}) == 3
    noise = [
        async_client.completions.create(model="m", prompt=f"Noise {i}", max_tokens=15, temperature=1.0)
        for i in range(12)
    ]
    crowd = await asyncio.gather(ask(3), *noise, ask(1), ask(2))
    assert [crowd[-2], crowd[-1], crowd[0]] == alone
    several = await ask(1, n=3)
    assert len(set(several)) == 3
    assert await ask(1, n=3) == several


def test_a_request_without_the_sdk_needs_only_json(engine: EngineProcess) -> None:
    request = urllib.request.Request(
        f"{engine.url}/v1/completions",
        json.dumps({"model": "m", "prompt": "Hi", "max_tokens": 1}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["object"] == "text_completion"
