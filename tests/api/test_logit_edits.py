"""Edits of logits, stops by token and best_of through the whole engine, in completions and chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

PROMPT = "The capital of France is"
Tokens = list[int]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    body: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "logprobs": 0} | fields
    extra = {"return_tokens_as_token_ids": True} | body.pop("extra_body", {})
    return client.completions.create(model="m", prompt=PROMPT, **body, extra_body=extra).choices[0]


def ids_of(choice: Any) -> Tokens:
    return [int(name.removeprefix("token_id:")) for name in choice.logprobs.tokens]


def test_a_bias_brings_a_token_in_and_keeps_one_out(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    paris, rome = tokenizer.token_to_id("ĠParis"), tokenizer.token_to_id("ĠRome")
    assert ids_of(complete(client))[0] == paris
    assert ids_of(complete(client, logit_bias={str(rome): 100})) == [rome] * 8
    assert paris not in ids_of(complete(client, logit_bias={str(paris): -100}))
    assert paris not in ids_of(complete(client, extra_body={"bad_words": ["Paris"]}))
    chat = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=3,
        logit_bias={str(rome): 100},
    )
    assert chat.choices[0].message.content == " Rome" * 3


def test_a_bad_word_of_several_tokens_is_not_said_and_its_parts_are(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    plain = complete(client, max_tokens=16)
    ids = ids_of(plain)
    for begin, length in ((0, 2), (3, 4), (9, 3)):
        word = tokenizer.decode(ids[begin : begin + length])
        assert tokenizer.encode(word).ids == ids[begin : begin + length]
        choice = complete(client, max_tokens=16, extra_body={"bad_words": [word]})
        assert word not in choice.text
        assert ids_of(choice)[: begin + length - 1] == ids[: begin + length - 1], "its beginning alone is no word"
        drawn = complete(client, max_tokens=16, n=4, temperature=0.7, seed=begin, extra_body={"bad_words": [word]})
        assert word not in drawn.text


def test_only_allowed_tokens_are_sampled_and_logprobs_stay_the_models_own(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    allowed = [tokenizer.token_to_id(token) for token in ("ĠRome", "ĠOslo", "ĠLima")]
    choice = complete(client, temperature=1.5, max_tokens=30, seed=3, extra_body={"allowed_token_ids": allowed})
    assert set(ids_of(choice)) <= set(allowed)
    assert max(choice.logprobs.token_logprobs[:3]) < -4, "the model itself likes others"


def test_a_choice_ends_at_a_stop_token_not_before_min_tokens(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    plain = ids_of(complete(client, extra_body={"ignore_eos": True}))
    stop = plain[3]
    place = plain.index(stop)
    ended = complete(client, extra_body={"stop_token_ids": [stop], "ignore_eos": True})
    assert (ids_of(ended), ended.finish_reason) == (plain[:place], "stop")
    kept = complete(client, extra_body={"stop_token_ids": [stop], "include_stop_str_in_output": True})
    assert kept.text == ended.text + tokenizer.decode([stop])
    later = complete(client, extra_body={"stop_token_ids": [stop], "min_tokens": place + 2})
    assert len(ids_of(later)) >= place + 2
    assert stop not in ids_of(later)[: place + 2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_kept_where_it_is_asked_for(client: openai.OpenAI, stream: bool) -> None:
    def text(**extra: Any) -> str:
        answer = client.completions.create(
            model="m", prompt=PROMPT, max_tokens=24, temperature=0, stop=["aris"], stream=stream, extra_body=extra
        )
        events = answer if stream else [answer]
        return "".join(choice.text for event in events for choice in event.choices)  # type: ignore[union-attr]

    assert text() == " P"
    assert text(include_stop_str_in_output=True) == " Paris"
    assert not text(min_tokens=3).startswith(" P\n")
    assert len(text(min_tokens=3)) > len(" Paris")


def test_special_tokens_are_shown_where_it_is_asked_for(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    fields: dict[str, Any] = {"max_tokens": 2, "logit_bias": {str(end): 100}}
    assert complete(client, **fields, extra_body={"ignore_eos": True}).text == ""
    shown = complete(client, **fields, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert shown.text == "<|im_end|>" * 2
    kept = complete(client, **fields, extra_body={"skip_special_tokens": False, "include_stop_str_in_output": True})
    assert (kept.text, kept.finish_reason) == ("<|im_end|>", "stop")


def test_the_best_of_several_choices_are_returned_and_all_are_paid_for(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 6, "temperature": 1.3, "seed": 11}
    extra = {"ignore_eos": True}
    every = client.completions.create(**body, n=6, logprobs=0, extra_body=extra)
    best = client.completions.create(**body, n=2, best_of=6, extra_body=extra)

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs)) / len(choice.logprobs.token_logprobs)

    expected = [choice.text for choice in sorted(every.choices, key=mean, reverse=True)[:2]]
    assert [choice.text for choice in best.choices] == expected
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert best.usage.completion_tokens == 36
