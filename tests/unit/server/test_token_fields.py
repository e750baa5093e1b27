"""Fields that act on tokens: what the manager is sent for them, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from toka_engine.messages import Submit
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import INFO, RunningServer

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_END = 2
"""SmolLM2's <|im_end|>."""
_IDS: list[Any] = [[-1], [INFO.vocab_size], [1.5], ["a"], [True], [None], {}, "1", list(range(1025)), [2**40]]

_WRONG: dict[str, list[Any]] = {
    "logit_bias": [
        [1], "1", False, {"x": 1}, {"-1": 1}, {"1.5": 1}, {"": 1}, {"٣": 1}, {str(INFO.vocab_size): 1}, {"9" * 5000: 1},
        {"1": 100.1}, {"1": -101}, {"1": "2"}, {"1": None}, {"1": True}, {"1": []},
        {str(token): 1 for token in range(1025)},
    ],
    "allowed_token_ids": [*_IDS, []],
    "stop_token_ids": _IDS,
    "bad_words": ["a", [1], [""], ["a"] * 1025, ["a" * 16385], ["a", None], {}],
    "min_tokens": [-1, 1.5, "1", True, [], 65, 2**63],
    "best_of": [0, -1, 1025, 1.5, "2", True, []],
    "prompt_logprobs": [-1, 21, 1.5, "2", True, []],
    "include_stop_str_in_output": [0, "true", [], {}],
    "skip_special_tokens": [0, "true", [], {}],
}  # fmt: skip


def submitted(server: RunningServer, path: str = _COMPLETIONS, **fields: Any) -> Submit:
    body = completion_body(**fields) if path == _COMPLETIONS else chat_body(**fields)
    status, answer = server.post(path, body)
    assert status == 200, answer
    (submit,) = server.manager.submits
    return submit


@pytest.mark.parametrize("path", [_COMPLETIONS, _CHAT])
@pytest.mark.parametrize(
    ("field", "value"),
    [pytest.param(field, value, id=f"{field}={value!r:.20}") for field, values in _WRONG.items() for value in values],
)
def test_a_wrong_value_is_refused_by_the_fields_name(server: RunningServer, path: str, field: str, value: Any) -> None:
    body = completion_body(max_tokens=64) if path == _COMPLETIONS else chat_body(max_tokens=64)
    status, answer = server.post(path, {**body, field: value})
    assert status == 400, answer
    assert answer["error"]["param"].split("[")[0].split(".")[0] == field
    assert field in answer["error"]["message"]
    assert server.manager.submits == []


@pytest.mark.parametrize("path", [_COMPLETIONS, _CHAT])
def test_neutral_values_ask_for_nothing(server: RunningServer, path: str) -> None:
    submit = submitted(
        server, path, logit_bias={}, bad_words=[], stop_token_ids=[], min_tokens=0, skip_special_tokens=True,
        include_stop_str_in_output=False, best_of=1, spaces_between_special_tokens=True, allowed_token_ids=None,
    )  # fmt: skip
    assert (submit.edits, submit.delivers_stop, submit.prompt_logprobs) == (None, False, -1)


def test_a_bad_word_of_several_tokens_is_barred_by_itself_and_behind_a_space(
    server: RunningServer, tokenizer: Tokenizer
) -> None:
    words = ["Paris", " New York", "unbelievable", "\U0001f600\U0001f600", "unbelievable"]
    edits = submitted(server, bad_words=words).edits
    assert edits is not None
    found = set(zip(edits.bias_ids.tolist()))
    begin = 0
    for last, length in zip(edits.words.ids.tolist(), edits.words.lengths.tolist(), strict=True):
        assert length > 0
        found.add((*edits.words.tokens[begin : begin + length].tolist(), last))
        begin += length
    asked = {tuple(tokenizer.encode_word(text)) for word in words for text in (word, f" {word}")}
    assert found <= asked
    for word in asked:
        assert any(word[-len(barred) :] == barred for barred in found), "each is barred, or ends with one that is"
    assert len(edits.words.ids) + len(edits.bias_ids) == len(found), "none twice"


@pytest.mark.parametrize("path", [_COMPLETIONS, _CHAT])
def test_the_fields_become_edits(server: RunningServer, path: str) -> None:
    submit = submitted(
        server, path, logit_bias={"7": 1.5, "9": -100}, bad_words=["Paris"], allowed_token_ids=[3, 4, 3, 7],
        stop_token_ids=[11, 12, 11], min_tokens=5,
    )  # fmt: skip
    edits = submit.edits
    assert edits is not None
    bias = dict(zip(edits.bias_ids.tolist(), edits.bias_values.tolist(), strict=True))
    assert (bias.pop(7), bias.pop(9)) == (1.5, -100.0)
    assert set(bias.values()) == {-math.inf}
    assert len(bias) == 2, "with a space before it, and without"
    assert edits.allowed_ids.tolist() == [3, 4, 7]
    assert (submit.stop_ids, edits.end_ids.tolist(), edits.min_tokens) == ((_END, 11, 12), [_END, 11, 12], 5)


def test_stop_tokens_end_a_choice_whatever_the_model_says(server: RunningServer) -> None:
    submit = submitted(server, stop_token_ids=[11], ignore_eos=True, min_tokens=2)
    assert submit.stop_ids == (11,)
    assert submit.edits is not None
    assert submit.edits.end_ids.tolist() == [11]


def test_without_anything_that_ends_it_a_least_number_of_tokens_needs_no_edits(server: RunningServer) -> None:
    assert submitted(server, ignore_eos=True, min_tokens=2).edits is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [_END], "min_tokens": 1}, "allowed_token_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 1000, "prompt": ["a", "b"]}, "best_of"),
        ({"echo": True, "logprobs": 20, "n": 500, "prompt": [[5] * 500], "max_tokens": 1}, "logprobs"),
        ({"prompt_logprobs": 20, "n": 500, "prompt": [[5] * 500], "max_tokens": 1}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_fields_that_exclude_each_other_are_refused(server: RunningServer, fields: Any, param: str) -> None:
    status, answer = server.post(_COMPLETIONS, completion_body(**fields))
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_the_prompts_logprobs_are_asked_for_as_widely_as_either_form_needs(server: RunningServer) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": 0}
    assert submitted(server, **body).prompt_logprobs == 2
    server.manager.submits.clear()
    submit = submitted(server, **body, prompt_logprobs=5)
    assert (submit.prompt_logprobs, submit.max_tokens) == (5, 1)
    server.manager.submits.clear()
    assert submitted(server, echo=True).prompt_logprobs == -1


def test_a_request_for_no_token_gets_its_prompt_and_pays_for_none(server: RunningServer) -> None:
    status, answer = server.post(_COMPLETIONS, completion_body(echo=True, max_tokens=0))
    assert status == 200
    choice, usage = answer["choices"][0], answer["usage"]
    assert (choice["text"], choice["finish_reason"], usage["completion_tokens"]) == ("Hello", "length", 0)
