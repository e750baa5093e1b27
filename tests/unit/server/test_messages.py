"""/v1/messages: Anthropic's form of the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import SENTENCE
from tests.unit.server.harness import MODEL, RunningServer, running_server
from tests.unit.server.test_tools import prompt_of, say
from tests.unit.server.transcripts import FORMATS

_PATH = "/v1/messages"
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLS = FORMATS["hermes"].write([("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})])


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 200, "messages": [{"role": "user", "content": "Hello"}], **fields}


def events_of(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    raw = json.dumps(body(stream=True, **fields)).encode()
    status, _, answer = server.request("POST", _PATH, raw, {"content-type": "application/json"})
    assert status == 200
    events = []
    for block in answer.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a client makes of its events."""
    message: dict[str, Any] = events[0]["message"]
    texts: list[str] = []
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                texts = []
            case "content_block_delta":
                assert event["index"] == len(message["content"]) - 1
                texts += [value for key, value in event["delta"].items() if key != "type"]
            case "content_block_stop":
                block = message["content"][event["index"]]
                key = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block["type"]]
                block[key] = json.loads("".join(texts)) if key == "input" else "".join(texts)
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert events[-1] == {"type": "message_stop"}
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {**message, "id": "", "content": blocks}


def test_a_message_is_answered_in_blocks(server: RunningServer) -> None:
    status, answer = server.post(_PATH, body(system="Be brief."))
    assert status == 200
    assert answer["content"] == [{"type": "text", "text": SENTENCE}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"]["input_tokens"] == len(server.manager.submits[-1].prompt_ids)
    assert answer["usage"]["output_tokens"] > 0


def test_calls_are_blocks(server: RunningServer, tokenizer: Tokenizer) -> None:
    say(server, tokenizer, f"Let me see.\n{CALLS}")
    _, answer = server.post(_PATH, body(tools=[WEATHER]))
    assert answer["stop_reason"] == "tool_use"
    text, first, second = answer["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert first == {"type": "tool_use", "id": first["id"], "name": "get_weather", "input": {"city": "Paris"}}
    assert second["input"] == {"city": "Rome"}
    assert first["id"].startswith("toolu_")
    assert first["id"] != second["id"]


@pytest.mark.parametrize("text", [SENTENCE, CALLS, f"So:\n{CALLS}\nDone", ""])
def test_the_streamed_message_is_the_whole_one(server: RunningServer, tokenizer: Tokenizer, text: str) -> None:
    say(server, tokenizer, text)
    _, whole = server.post(_PATH, body(tools=[WEATHER]))
    assert without_ids(put_together(events_of(server, tools=[WEATHER]))) == without_ids(whole)


def test_the_stop_sequence_is_named(server: RunningServer) -> None:
    for stops, found in ((["Paris", "Par"], "Par"), (["is Paris"], "is Paris")):
        _, answer = server.post(_PATH, body(stop_sequences=stops))
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", found)
        assert put_together(events_of(server, stop_sequences=stops))["stop_sequence"] == found


def test_a_message_cut_by_its_limit_says_so(server: RunningServer) -> None:
    _, answer = server.post(_PATH, body(max_tokens=3))
    assert answer["stop_reason"] == "max_tokens"


def test_reasoning_is_a_block_of_thinking(tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for path in tokenizer_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}\n{% endfor %}<think>{# </think> #}"
    (tmp_path / "chat_template.jinja").write_text(template)
    with running_server(tmp_path) as server:
        say(server, tokenizer, "I wonder.</think>Paris.")
        _, answer = server.post(_PATH, body())
        assert answer["content"][0] == {"type": "thinking", "thinking": "I wonder.", "signature": ""}
        messages = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": "Sure?"},
        ]
        server.post(_PATH, body(messages=messages))
        assert "I wonder.|Paris.\n" in prompt_of(server, tokenizer)


def test_blocks_become_the_conversation(server: RunningServer, tokenizer: Tokenizer) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    status, answer = server.post(_PATH, body(messages=messages, system=[{"type": "text", "text": "Be brief."}]))
    assert status == 200, answer
    prompt = prompt_of(server, tokenizer)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert f"<|im_start|>assistant\nI look.\n{call}<|im_end|>" in prompt
    assert "<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>" in prompt


def test_tokens_can_be_counted_without_an_answer(server: RunningServer) -> None:
    _, answer = server.post(_PATH, body(tools=[WEATHER]))
    count = {key: value for key, value in body(tools=[WEATHER]).items() if key != "max_tokens"}
    num_submits = len(server.manager.submits)
    assert server.post(f"{_PATH}/count_tokens", count) == (200, {"input_tokens": answer["usage"]["input_tokens"]})
    assert len(server.manager.submits) == num_submits


def test_tools_that_a_server_would_run_are_named_as_ignored(server: RunningServer) -> None:
    raw = json.dumps(body(tools=[{"type": "web_search_20250305", "name": "web_search"}], thinking={"type": "enabled"}))
    status, headers, _ = server.request("POST", _PATH, raw.encode(), {"content-type": "application/json"})
    assert (status, headers["x-toka-ignored"]) == (200, "tools.web_search_20250305,thinking")


def test_a_key_may_come_as_anthropics_clients_send_it(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, env={"TOKA_API_KEY": "secret"}) as server:
        for headers, status in (({"x-api-key": "secret"}, 400), ({"x-api-key": "wrong"}, 401), ({}, 401)):
            assert server.post(_PATH, body(messages=[]), headers)[0] == status


_BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [1]}, "messages[0].role"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{"name": "a b"}]}, "tools[0].function.name"),
    ({"temperature": 3}, "temperature"),
    ({"mcp_servers": []}, "mcp_servers"),
]


@pytest.mark.parametrize(("fields", "param"), _BAD, ids=[f"{param}{number}" for number, (_, param) in enumerate(_BAD)])
def test_a_wrong_field_is_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    status, answer = server.post(_PATH, body(**fields))
    assert (status, answer["error"]["param"]) == (400, param)
