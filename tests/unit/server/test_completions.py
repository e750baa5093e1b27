"""/v1/completions as a client sees it."""

from __future__ import annotations

import numpy as np
import openai
import pytest
from toka_engine.messages import FINISH_ERROR, FINISH_LENGTH, Deltas, Refused, Submit
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import SENTENCE, completion_body
from tests.unit.server.harness import MODEL, RunningServer, each, end, speak, streams_of, whole


def test_a_completion_has_the_text_and_the_usage(client: openai.OpenAI, sentence_ids: list[int]) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello there", max_tokens=64)
    assert answer.object == "text_completion"
    assert [choice.text for choice in answer.choices] == [SENTENCE]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == len(sentence_ids) + 1
    assert answer.usage.total_tokens == len(sentence_ids) + 3


def test_the_body_has_exactly_the_fields_of_openai(server: RunningServer) -> None:
    status, answer = server.post("/v1/completions", completion_body())
    assert status == 200
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert answer["choices"] == [{"index": 0, "text": SENTENCE, "logprobs": None, "finish_reason": "stop"}]


def test_max_tokens_is_sixteen_by_default(server: RunningServer) -> None:
    status, _ = server.post("/v1/completions", {"model": MODEL, "prompt": "Hello"})
    assert status == 200
    assert server.manager.submits[0].max_tokens == 16


def test_a_completion_that_reaches_its_limit_says_length(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == "The capital of"


def test_prompts_times_n_are_numbered_by_prompt_then_choice(
    client: openai.OpenAI, server: RunningServer, sentence_ids: list[int], tokenizer: Tokenizer
) -> None:
    def answer_by_prompt(submit: Submit) -> None:
        for stream in reversed(streams_of(submit)):
            number = len(submit.prompt_ids) * 3 + stream - submit.first_stream
            server.manager.send(whole(stream, sentence_ids[:number]))

    server.manager.on_submit = answer_by_prompt
    answer = client.completions.create(model=MODEL, prompt=[[5], [5, 6]], n=2, max_tokens=64)  # type: ignore[arg-type]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [submit.prompt_ids.tolist() for submit in server.manager.submits] == [[5], [5, 6]]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    expected = [tokenizer.text_of(np.array(sentence_ids[:number], np.int32)) for number in (3, 4, 6, 7)]
    assert [choice.text for choice in answer.choices] == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("Hi", [1]), (["Hi", "Hello there"], [1, 2]), ([1, 2, 3], [3]), ([[1, 2], [3]], [2, 1])],
    ids=["text", "texts", "ids", "lists-of-ids"],
)
def test_each_form_of_prompt_is_taken(server: RunningServer, prompt: object, expected: list[int]) -> None:
    status, answer = server.post("/v1/completions", completion_body(prompt=prompt))
    assert status == 200
    assert [len(submit.prompt_ids) for submit in server.manager.submits] == expected
    assert len(answer["choices"]) == len(expected)


def test_sampling_fields_reach_the_manager(server: RunningServer) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "seed": 11,
        "n": 3,
        "logprobs": 2,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.25,
    }
    status, _ = server.post("/v1/completions", completion_body(**fields))
    submit = server.manager.submits[0]
    assert status == 200
    assert submit.num_choices == 3
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.seed, sampling.num_logprobs) == (11, 2)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert penalties == (-2.0, 0.5, 1.25)


def test_a_top_p_of_zero_is_greedy(server: RunningServer) -> None:
    server.post("/v1/completions", completion_body(top_p=0))
    sampling = server.manager.submits[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


def test_ignore_eos_takes_the_stop_tokens_away(server: RunningServer) -> None:
    server.post("/v1/completions", completion_body())
    server.post("/v1/completions", completion_body(ignore_eos=True))
    assert [submit.stop_ids for submit in server.manager.submits] == [(2,), ()]


def test_only_streams_and_stop_strings_ask_for_each_token(server: RunningServer) -> None:
    for fields in ({}, {"stop": "nowhere"}, {"logprobs": 0}):
        server.post("/v1/completions", completion_body(**fields))
    server.request(
        "POST",
        "/v1/completions",
        b'{"model":"smollm2","prompt":"Hi","stream":true}',
        {"content-type": "application/json"},
    )
    assert [submit.deliver_each for submit in server.manager.submits] == [False, True, False, True]
    assert [submit.is_streamed for submit in server.manager.submits] == [False, False, False, True]


def test_neutral_values_of_unsupported_fields_are_taken(server: RunningServer) -> None:
    fields = {
        "logit_bias": {},
        "best_of": 1,
        "suffix": None,
        "user": "u",
    }
    assert server.post("/v1/completions", completion_body(**fields))[0] == 200


def test_echo_puts_the_prompt_before_each_choice(server: RunningServer, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["One:", "Two:"], echo=True, n=2, max_tokens=64)
    assert [choice.text for choice in answer.choices] == [p + SENTENCE for p in ("One:", "One:", "Two:", "Two:")]
    chunks = client.completions.create(model=MODEL, prompt=[1531, 253], echo=True, max_tokens=64, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text.endswith(SENTENCE)
    assert len(text) > len(SENTENCE)


def test_a_stop_string_across_tokens_cuts_the_text_and_its_tokens_count(
    server: RunningServer, client: openai.OpenAI, sentence_ids: list[int]
) -> None:
    manager = server.manager
    manager.on_submit = (
        lambda submit: [  # type: ignore[assignment,return-value]
            manager.send(each(streams_of(submit), [token])) for token in sentence_ids[:8]
        ]
    )
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=64, stop=[" is Par"])
    assert answer.choices[0].text == "The capital of France"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    manager.wait_for(lambda: manager.cancelled == set(streams_of(manager.submits[0])))


def test_a_stop_string_cuts_one_choice_and_leaves_the_others(
    server: RunningServer, client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    first, second = (ids.tolist() for ids in tokenizer.encode(["a b STOP c", "a b c d e f"], add_special_tokens=False))
    manager = server.manager

    def answer_apart(submit: Submit) -> None:
        one, other = streams_of(submit)
        for token in first:
            manager.send(each([one], [token]))
        for token in second:
            manager.send(each([other], [token]))
        manager.send(end([other], len(second), FINISH_LENGTH))

    manager.on_submit = answer_apart
    answer = client.completions.create(model=MODEL, prompt="Hello", n=2, max_tokens=64, stop="STOP")
    assert [choice.text for choice in answer.choices] == ["a b ", "a b c d e f"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]


def test_logprobs_come_with_tokens_offsets_and_tops(
    server: RunningServer, client: openai.OpenAI, sentence_ids: list[int]
) -> None:
    ids = sentence_ids[:3]

    def with_logprobs(submit: Submit) -> None:
        server.manager.send(
            Deltas(
                ended=np.array([submit.first_stream], np.int64),
                ended_reasons=np.array([FINISH_LENGTH], np.uint8),
                ended_num_tokens=np.array([3], np.int32),
                ended_lengths=np.array([3], np.int32),
                ended_tokens=np.array(ids, np.int32),
                ended_logprobs=np.array([-0.5, np.nan, -np.inf], np.float32),
                top_rows=np.array([0, 2], np.int32),
                top_tokens=np.array([ids[0], 2, ids[2], -1], np.int32),
                top_logprobs=np.array([-0.5, -1.5, -0.25, 0], np.float32),
                top_width=2,
                top_of_ended=True,
            )
        )

    server.manager.on_submit = with_logprobs
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["The", " capital", " of"]
    assert logprobs.token_logprobs == [-0.5, None, -9999.0]
    assert logprobs.text_offset == [0, 3, 11]
    assert logprobs.top_logprobs == [{"The": -0.5, "<|im_end|>": -1.5}, {}, {" of": -0.25}]  # NaN: none
    named = {"return_tokens_as_token_ids": True}
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, logprobs=2, extra_body=named)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    names = [f"token_id:{token}" for token in ids]
    assert logprobs.tokens == names
    assert logprobs.top_logprobs == [{names[0]: -0.5, "token_id:2": -1.5}, {}, {names[2]: -0.25}]
    assert (answer.choices[0].text, logprobs.text_offset) == ("The capital of", [0, 3, 11])


def test_logprobs_are_cut_with_the_text_at_a_stop_string(server: RunningServer, sentence_ids: list[int]) -> None:
    manager = server.manager

    def with_logprobs(submit: Submit) -> None:
        for row, token in enumerate(sentence_ids):
            delta = each([submit.first_stream], [token])
            manager.send(Deltas(streams=delta.streams, tokens=delta.tokens, logprobs=np.array([-row], np.float32)))

    manager.on_submit = with_logprobs
    _, answer = server.post("/v1/completions", completion_body(stop="rance", logprobs=0))
    assert answer["choices"][0]["text"] == "The capital of F"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["The", " capital", " of", " France"]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [0.0, -1.0, -2.0, -3.0]
    assert answer["choices"][0]["logprobs"]["top_logprobs"] is None


def test_a_full_queue_is_a_429_and_cancels_the_rest(server: RunningServer, client: openai.OpenAI) -> None:
    def refuse_second(submit: Submit) -> None:
        if submit.prompt_ids.tolist() == [6]:
            server.manager.send(Refused(submit.first_stream, "the queue is full"))

    server.manager.on_submit = refuse_second
    with pytest.raises(openai.RateLimitError, match="the queue is full"):
        client.completions.create(model=MODEL, prompt=[[5], [6]], max_tokens=4)  # type: ignore[arg-type]
    first = server.manager.submits[0].first_stream
    server.manager.wait_for(lambda: first in server.manager.cancelled)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stream_refused_before_its_first_token_has_a_status(server: RunningServer, is_streamed: bool) -> None:
    server.manager.on_submit = lambda submit: server.manager.send(Refused(submit.first_stream, "full"))
    status, answer = server.post("/v1/completions", completion_body(stream=is_streamed))
    assert status == 429
    assert answer["error"]["code"] == "queue_full"


def test_non_finite_values_are_a_500_for_that_request_only(
    server: RunningServer, client: openai.OpenAI, sentence_ids: list[int]
) -> None:
    def spoil_long_prompts(submit: Submit) -> None:
        if len(submit.prompt_ids) > 1:
            server.manager.send(whole(submit.first_stream, [], FINISH_ERROR))
        else:
            speak(server.manager, submit, sentence_ids)

    server.manager.on_submit = spoil_long_prompts
    with pytest.raises(openai.InternalServerError, match="non-finite"):
        client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=4)
    assert client.completions.create(model=MODEL, prompt=[5], max_tokens=64).choices[0].text == SENTENCE


def test_a_thousand_choices_come_back_in_order(server: RunningServer, client: openai.OpenAI) -> None:
    server.manager.on_submit = lambda submit: server.manager.send(
        *(whole(stream, [28 + stream % 10]) for stream in streams_of(submit))
    )
    answer = client.completions.create(model=MODEL, prompt="Hello", n=1000, max_tokens=4)
    assert [choice.index for choice in answer.choices] == list(range(1000))


def test_a_prompt_text_keeps_its_special_tokens(server: RunningServer) -> None:
    server.post("/v1/completions", completion_body(prompt="<|im_start|>user"))
    assert server.manager.submits[0].prompt_ids.tolist()[0] == 1


def test_a_body_in_pieces_is_put_together(server: RunningServer) -> None:
    text = "word " * 1500
    status, _ = server.post("/v1/completions", completion_body(prompt=text))
    assert status == 200
    body = b'{"model":"smollm2","prompt":"Hi"}'
    with server.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        sock.sendall(b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in (body[:5], body[5:]):
            sock.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        sock.sendall(b"0\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
