"""/v1/responses: items and events as the SDK takes them, continued conversations, and what is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall
from toka_engine.messages import FINISH_ERROR
from toka_engine.server.errors import ApiError
from toka_engine.server.responses.store import MAX_CHAIN, ResponseStore, StoredResponse
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import SENTENCE, client_of
from tests.unit.server.harness import MODEL, RunningServer, each, end, running_server, speak, streams_of
from tests.unit.server.test_tools import prompt_of, say
from tests.unit.server.transcripts import FORMATS

_PATH = "/v1/responses"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CALL = FORMATS["hermes"].write([("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})])


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "Hello", **fields}


def events_of(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a streamed response, each under the name that its own type says."""
    raw = json.dumps(body(stream=True, **fields)).encode()
    status, headers, answer = server.request("POST", _PATH, raw, {"content-type": "application/json"})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = []
    for block in answer.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def without_ids(value: Any) -> Any:
    """Return a response without what differs from one answer to the next."""
    own = ("id", "call_id", "created_at", "completed_at")
    if isinstance(value, dict):
        return {key: without_ids(each) for key, each in value.items() if key not in own}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- whole and streamed


def test_a_response_is_a_message(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello", instructions="Be brief.", metadata={"a": "b"})
    assert response.output_text == SENTENCE
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.id.startswith("resp_")
    assert response.usage
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.usage.input_tokens_details.cached_tokens >= 0
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})


@pytest.mark.parametrize(
    "text", [SENTENCE, CALL, f"Let me see.\n{CALL}\nDone", ""], ids=["text", "calls", "both", "none"]
)
def test_the_streamed_response_is_the_whole_one(
    server: RunningServer, client: openai.OpenAI, tokenizer: Tokenizer, text: str
) -> None:
    say(server, tokenizer, text)
    whole = client.responses.create(model=MODEL, input="Hello", tools=[WEATHER])
    with client.responses.stream(model=MODEL, input="Hello", tools=[WEATHER]) as stream:
        streamed = list(stream)[-1].response  # type: ignore[union-attr]
    assert isinstance(streamed, Response)
    kept = client.responses.retrieve(whole.id)
    assert kept.to_dict() == whole.to_dict()
    streamed_kept = client.responses.retrieve(streamed.id)
    assert without_ids(streamed_kept.to_dict()) == without_ids(whole.to_dict())


def test_events_come_numbered_in_order_and_each_item_is_done(server: RunningServer, tokenizer: Tokenizer) -> None:
    say(server, tokenizer, f"Let me see.\n{CALL}")
    events = events_of(server, tools=[WEATHER])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-1] == "completed"
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["message", "function_call", "function_call"]
    for index, item in enumerate(final["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["id"] == item["id"]
        assert own[-1] == {**own[-1], "type": "response.output_item.done", "item": item}
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        if item["type"] == "message":
            assert deltas == item["content"][0]["text"] == "Let me see."
            assert all(event["logprobs"] == [] for event in own if event["type"].endswith("text.delta"))
        else:
            assert deltas == item["arguments"]
            assert {"response.function_call_arguments.done"} <= {event["type"] for event in own}


def test_a_response_cut_by_the_limit_is_incomplete(server: RunningServer, client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete"  # type: ignore[union-attr]
    assert events_of(server, max_output_tokens=3)[-1]["type"] == "response.incomplete"


def test_a_stream_that_fails_ends_with_a_failed_response(server: RunningServer) -> None:
    def fail(submit: Any) -> None:
        streams = streams_of(submit)
        server.manager.send(each(streams, [500]))
        threading.Timer(0.2, lambda: server.manager.send(end(streams, 1, FINISH_ERROR))).start()

    server.manager.on_submit = fail
    events = events_of(server)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "failed"
    assert "non-finite" in events[-1]["response"]["error"]["message"]


def test_logprobs_are_given_where_they_are_included(server: RunningServer, client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello", include=["message.output_text.logprobs"])
    message: Any = response.output[0]
    part = message.content[0]
    assert server.manager.submits[-1].sampling.num_logprobs == 0
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs).decode() == SENTENCE


def test_reasoning_is_an_item_of_its_own(tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for path in tokenizer_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}\n{% endfor %}<think>{# </think> #}"
    (tmp_path / "chat_template.jinja").write_text(template)
    with running_server(tmp_path) as server:
        say(server, tokenizer, "I wonder.</think>Paris.")
        client = client_of(server)
        first = client.responses.create(model=MODEL, input="Hello")
        assert [item.type for item in first.output] == ["reasoning", "message"]
        assert first.output[0].content[0].text == "I wonder."  # type: ignore[union-attr,index]
        assert first.usage
        assert first.usage.output_tokens_details.reasoning_tokens > 0
        events = events_of(server)
        assert "response.reasoning_text.delta" in {event["type"] for event in events}
        items: Any = [{"role": "user", "content": "Hello"}, *(item.to_dict() for item in first.output)]
        client.responses.create(model=MODEL, input=[*items, {"role": "user", "content": "Sure?"}])
        assert "I wonder.|Paris.\n" in prompt_of(server, tokenizer)


# ---------------------------------------------------------------- input


def test_items_become_the_conversation(server: RunningServer, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
    items: Any = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {
            "id": "rs_1",
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "hm"}],
            "encrypted_content": "x",
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {**call, "id": "fc_1", "status": "completed"},
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    client.responses.create(model=MODEL, instructions="Be brief.", input=items)
    prompt = prompt_of(server, tokenizer)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nRules.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>")
    written = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert f"<|im_start|>assistant\nI look.\n{written}\n{written}<|im_end|>" in prompt
    assert "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrain\n</tool_response>" in prompt


def test_a_response_continues_an_earlier_one(
    server: RunningServer, client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    say(server, tokenizer, CALL)
    first = client.responses.create(model=MODEL, input="Weather?", instructions="First.", tools=[WEATHER])
    outputs: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"sunny in {number}"}
        for number, item in enumerate(first.output)
        if isinstance(item, ResponseFunctionToolCall)
    ]
    assert len(outputs) == 2
    say(server, tokenizer, "Fine.")
    second = client.responses.create(model=MODEL, input=outputs, previous_response_id=first.id, instructions="Second.")
    third = client.responses.create(model=MODEL, input="Thanks", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    prompt = prompt_of(server, tokenizer)
    assert "First." not in prompt
    assert "Second." not in prompt
    for text in ("Weather?", '"Rome"', "sunny in 0", "sunny in 1", "Fine.", "Thanks"):
        assert text in prompt


def test_kept_responses_can_be_read_listed_and_deleted(server: RunningServer, client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    response = client.responses.create(model=MODEL, input=items)
    listed = client.responses.input_items.list(response.id, order="asc", limit=2)
    assert [item.content for item in listed] == ["a", "b", "c"]  # type: ignore[union-attr]
    newest = client.responses.input_items.list(response.id, limit=1).data
    assert [item.content for item in newest] == ["c"]  # type: ignore[union-attr]
    client.responses.delete(response.id)
    for reading in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            reading(response.id)
    with pytest.raises(openai.NotFoundError) as refusal:
        client.responses.create(model=MODEL, input="x", previous_response_id=response.id)
    assert refusal.value.param == "previous_response_id"


def test_a_response_that_is_not_to_be_kept_is_not(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_with_truncation_the_oldest_turns_go(
    server: RunningServer, client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    turns: Any = [
        {"role": role, "content": f"{role} {number} " + "word " * 150}
        for number in range(10)
        for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "Rules."}, *turns, {"role": "user", "content": "Last?"}]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model=MODEL, input=items)
    assert refusal.value.param == "input"
    client.responses.create(model=MODEL, input=items, truncation="auto")
    prompt = prompt_of(server, tokenizer)
    assert "Rules." in prompt
    assert "Last?" in prompt
    assert "user 0 " not in prompt
    assert "user 9 " in prompt


# ---------------------------------------------------------------- tools


def test_hosted_tools_are_named_as_ignored(server: RunningServer, tokenizer: Tokenizer) -> None:
    tools = [{"type": "web_search"}, WEATHER, {"type": "image_generation"}]
    raw = json.dumps(body(tools=tools, include=["reasoning.encrypted_content"])).encode()
    status, headers, _ = server.request("POST", _PATH, raw, {"content-type": "application/json"})
    assert status == 200
    assert headers["x-toka-ignored"] == "tools.web_search,tools.image_generation,include"
    prompt = prompt_of(server, tokenizer)
    assert "get_weather" in prompt
    assert "web_search" not in prompt
    status, answer = server.post(_PATH, body(tools=tools, tool_choice={"type": "web_search"}))
    assert (status, answer["error"]["param"]) == (400, "tool_choice")


def test_a_custom_tool_gets_free_text(server: RunningServer, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    patch = '*** Begin\n"quoted" <text>\n'
    say(server, tokenizer, FORMATS["hermes"].write([("apply_patch", {"input": patch})]))
    tool: Any = {"type": "custom", "name": "apply_patch", "description": "Patches files"}
    response = client.responses.create(model=MODEL, input="Patch it", tools=[tool])
    item: Any = response.output[0]
    assert (item.type, item.name, item.input) == ("custom_tool_call", "apply_patch", patch)
    events = events_of(server, tools=[tool])
    done = [event for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert [event["input"] for event in done] == [patch]
    again: Any = [
        {"role": "user", "content": "Patch it"},
        item.to_dict(),
        {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "done"},
    ]
    client.responses.create(model=MODEL, input=again, tools=[tool])
    assert "<tool_response>\ndone\n</tool_response>" in prompt_of(server, tokenizer)


# ---------------------------------------------------------------- counting


def test_tokens_can_be_counted_without_an_answer(server: RunningServer, client: openai.OpenAI) -> None:
    """The prompt is counted: texts and items, instructions, tools, and what is continued."""
    first = client.responses.create(model=MODEL, input="Hello", instructions="Be brief.")
    asked: list[dict[str, Any]] = [
        {"input": "Hello"},
        {"input": [{"role": "user", "content": "Hello"}], "instructions": "Be brief."},
        {"input": "Hello", "tools": [WEATHER], "tool_choice": "required", "reasoning": {"effort": "low"}},
        {"input": "And now?", "previous_response_id": first.id},
    ]
    counts = []
    for fields in asked:
        wanted = client.responses.create(model=MODEL, **fields).usage
        num_submits = len(server.manager.submits)
        count = client.responses.input_tokens.count(**fields)
        assert (count.object, count.input_tokens) == ("response.input_tokens", wanted.input_tokens if wanted else 0)
        assert client.responses.input_tokens.count(model=MODEL, **fields) == count
        assert len(server.manager.submits) == num_submits
        counts.append(count.input_tokens)
    assert len(set(counts)) == len(counts)


_BAD_COUNTS: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": [1]}, "input[0]"),
    ({"input": "x", "model": "other"}, "model"),
    ({"input": "x", "conversation": "c"}, "conversation"),
    ({"input": "x", "temperature": 1}, "temperature"),
    ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format"),
    ({"input": "x", "tool_choice": "required"}, "tool_choice"),
    ({"input": "x", "previous_response_id": "resp_none"}, "previous_response_id"),
    ({"input": "word " * 100_000}, "input"),
]


@pytest.mark.parametrize(
    ("fields", "param"), _BAD_COUNTS, ids=[f"{param}{n}" for n, (_, param) in enumerate(_BAD_COUNTS)]
)
def test_a_wrong_field_of_a_count_is_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    status, answer = server.post(f"{_PATH}/input_tokens", fields)
    assert status in (400, 404)
    assert answer["error"]["param"] == param, answer


# ---------------------------------------------------------------- what is refused

_BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [1]}, "input[0]"),
    ({"input": [{"type": "image"}]}, "input[0].type"),
    ({"input": [{"type": ["x"]}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"input": [{"role": "user", "content": "x"}] * 16385}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_logprobs": 99}, "top_logprobs"),
    ({"truncation": "some"}, "truncation"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"tools": [{"type": 1}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
    ({"n": 2}, "n"),
    ({"model": "other"}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), _BAD, ids=[param + str(number) for number, (_, param) in enumerate(_BAD)])
def test_a_wrong_field_is_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    status, answer = server.post(_PATH, body(**fields))
    assert status in (400, 404)
    assert answer["error"]["param"] == param, answer


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=nobody"])
def test_a_wrong_parameter_of_a_list_is_named(server: RunningServer, client: openai.OpenAI, query: str) -> None:
    response = client.responses.create(model=MODEL, input="Hello")
    mine = {"authorization": "Bearer none"}
    status, _, answer = server.request("GET", f"{_PATH}/{response.id}/input_items?{query}", None, mine)
    assert (status, json.loads(answer)["error"]["param"]) == (400, query.partition("=")[0])


# ---------------------------------------------------------------- the store


def _stored(size: int, previous: str | None = None) -> StoredResponse:
    return StoredResponse("me", b"x" * size, b'[{"n":1}]', b"[]", previous)


def test_the_store_keeps_the_latest_within_its_bounds() -> None:
    store = ResponseStore(max_bytes=10_000, max_responses=3)
    for number in range(5):
        store.put(f"r{number}", _stored(100))
    assert len(store) == 3
    store.get("me", "r2")
    store.put("r5", _stored(7000))
    assert store.num_bytes <= 10_000
    assert store.get("me", "r5")
    with pytest.raises(ApiError):
        store.get("me", "r3")
    store.put("large", _stored(20_000))
    with pytest.raises(ApiError):
        store.get("me", "large")
    store.delete("me", "r5")
    with pytest.raises(ApiError):
        store.delete("me", "r5")
    store.delete("me", "r2")
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_store_shows_a_response_to_its_owner_alone() -> None:
    store = ResponseStore(max_bytes=10_000)
    store.put("r", _stored(100))
    for ask in (store.get, store.delete, store.items_until):
        with pytest.raises(ApiError) as refusal:
            ask("you", "r")
        assert refusal.value.status == 404
    assert store.get("me", "r")


def test_a_chain_is_not_followed_for_ever() -> None:
    store = ResponseStore(max_bytes=2**20)
    for number in range(MAX_CHAIN + 1):
        store.put(f"r{number}", _stored(1, f"r{number - 1}" if number else None))
    assert len(store.items_until("me", f"r{MAX_CHAIN - 1}")) == 2 * MAX_CHAIN  # of each its input and its output
    with pytest.raises(ApiError, match=str(MAX_CHAIN)) as refusal:
        store.items_until("me", f"r{MAX_CHAIN}")
    assert refusal.value.status == 400


def test_a_server_may_keep_nothing(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, response_store_bytes=0) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        client = client_of(server)
        response = client.responses.create(model=MODEL, input="Hello")
        with pytest.raises(openai.NotFoundError, match="response_store_bytes"):
            client.responses.retrieve(response.id)
