"""Fields of a chat request that reach the template, and the ends that a prompt may have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toka_engine.server.chat_template import ChatTemplate
from toka_engine.server.errors import ApiError
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import RunningServer, running_server, speak

_CHAT = "/v1/chat/completions"
_SOURCE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined %}(thinking {{ enable_thinking }}){% endif %}"
    "{% if reasoning_effort is defined %}(effort {{ reasoning_effort }}){% endif %}"
    "{% for d in documents or [] %}(document {{ d.text }}){% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_HI = [{"role": "user", "content": "Hi"}]
_PREFILL = [*_HI, {"role": "assistant", "content": "The answer is "}]


@pytest.fixture(scope="module")
def reading_server(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose template reads some variables."""
    folder = tmp_path_factory.mktemp("reading")
    for file in tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(_SOURCE)
    with running_server(folder) as server:
        manager = server.manager
        manager.on_submit = lambda submit: speak(manager, submit, [5, 6])
        yield server


def _prompt(server: RunningServer, tokenizer: Tokenizer, **fields: Any) -> tuple[str, str | None]:
    """Return the prompt that the manager got, as text, and the ignored fields."""
    import json

    server.manager.submits.clear()
    raw = json.dumps(chat_body(**{"messages": _HI, **fields})).encode()
    status, headers, answer = server.request("POST", _CHAT, raw, {"content-type": "application/json"})
    assert status == 200, answer
    ids = server.manager.submits[0].prompt_ids.tolist()
    return b"".join(map(tokenizer.label_of, ids)).decode(), headers.get("x-toka-ignored")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "[user]Hi[assistant]"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[user]Hi(thinking False)[assistant]"),
        ({"chat_template_kwargs": {}}, "[user]Hi[assistant]"),
        ({"reasoning_effort": "low"}, "[user]Hi(effort low)[assistant]"),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, "[user]Hi(effort high)[assistant]"),
        ({"documents": [{"text": "One"}, {"text": "Two"}]}, "[user]Hi(document One)(document Two)[assistant]"),
        ({"add_generation_prompt": False}, "[user]Hi"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "[user]Hi"),
        ({"messages": _PREFILL, "continue_final_message": True}, "[user]Hi[assistant]The answer is "),
        (
            {"messages": _PREFILL, "continue_final_message": True, "add_generation_prompt": False},
            "[user]Hi[assistant]The answer is ",
        ),
        ({"messages": _PREFILL, "continue_final_message": False}, "[user]Hi[assistant]The answer is [assistant]"),
    ],
)
def test_a_variable_reaches_the_template(
    reading_server: RunningServer, tokenizer: Tokenizer, fields: dict[str, Any], expected: str
) -> None:
    assert _prompt(reading_server, tokenizer, **fields) == (expected, None)


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        (
            {"chat_template_kwargs": {"enable_thinking": True, "foo": 1}},
            "chat_template_kwargs.foo,chat_template_kwargs.enable_thinking",
        ),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"documents": [{"text": "x"}]}, "documents"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_named(
    server: RunningServer, tokenizer: Tokenizer, fields: dict[str, Any], ignored: str
) -> None:
    _, named = _prompt(server, tokenizer, **fields)
    assert named is not None
    assert set(named.split(",")) == set(ignored.split(","))


_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    "bos": ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
    "tools": ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
    "list": ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    "large": ({"chat_template_kwargs": {"a": "x" * 70_000}}, "chat_template_kwargs"),
    "many": ({"chat_template_kwargs": {"a": [0] * 70_000}}, "chat_template_kwargs"),
    "kwarg-number": (
        {"chat_template_kwargs": {"add_generation_prompt": 1}},
        "chat_template_kwargs.add_generation_prompt",
    ),
    "both-ends": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    "differ": (
        {"add_generation_prompt": True, "chat_template_kwargs": {"add_generation_prompt": False}},
        "add_generation_prompt",
    ),
    "documents-text": ({"documents": "x"}, "documents"),
    "documents-large": ({"documents": [{"text": "x" * 2_000_000}]}, "documents"),
    "effort-long": ({"reasoning_effort": "x" * 65}, "reasoning_effort"),
    "effort-empty": ({"reasoning_effort": ""}, "reasoning_effort"),
    "effort-number": ({"reasoning_effort": 1}, "reasoning_effort"),
    "truncate-zero": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    "truncate-minus-two": ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    "truncate-too-many": ({"truncate_prompt_tokens": 2048}, "truncate_prompt_tokens"),
}


@pytest.mark.parametrize(("fields", "param"), _WRONG.values(), ids=_WRONG)
def test_a_wrong_variable_is_refused_by_name(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    status, answer = server.post(_CHAT, chat_body(**fields))
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert param in answer["error"]["message"]
    assert server.manager.submits == []


def test_deep_variables_are_refused_by_name(server: RunningServer) -> None:
    deep = '{"a":' * 100 + "1" + "}" * 100
    body = b'{"model":"smollm2","messages":[{"role":"user","content":"x"}],"chat_template_kwargs":%s}' % deep.encode()
    status, answer = server.post(_CHAT, body)
    assert (status, answer["error"]["param"]) == (400, "chat_template_kwargs")


def test_a_variables_text_never_becomes_a_special_token(reading_server: RunningServer, tokenizer: Tokenizer) -> None:
    text = "<|im_end|><|im_start|>"
    for fields in (
        {"documents": [{"text": text}]},
        {"chat_template_kwargs": {"enable_thinking": text}},
        {"reasoning_effort": text},
    ):
        prompt, _ = _prompt(reading_server, tokenizer, **fields)
        assert text in prompt
        ids = reading_server.manager.submits[0].prompt_ids.tolist()
        assert not [token for token in ids if token <= 16]


def test_a_final_message_is_continued_where_it_ends(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    from toka_engine.server.chat_template import load_chat_template
    from transformers import AutoTokenizer

    template = load_chat_template(tokenizer_dir, tokenizer.special_texts)
    assert template is not None
    reference = AutoTokenizer.from_pretrained(tokenizer_dir)
    for content in ("The answer is", "The\nanswer", "<|im_end|> is"):
        messages = [*_HI, {"role": "assistant", "content": content}]
        parts = template.render(messages, continues_final=True)
        expected = reference.apply_chat_template(messages, continue_final_message=True, tokenize=False)
        assert "".join(parts) == expected
    # A template that trims: the text ends with the content as it was sent.
    trimming = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", {}, ())
    assert trimming.render([{"role": "assistant", "content": " Yes, "}], continues_final=True) == ["[Yes, "]


def test_a_template_that_leaves_the_final_message_out_cannot_continue_it() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, ())
    with pytest.raises(ApiError) as refusal:
        template.render([*_HI, {"role": "assistant", "content": "x"}], continues_final=True)
    assert (refusal.value.status, refusal.value.param) == (400, "continue_final_message")


# ---------------------------------------------------------------- truncation, special tokens


def test_a_truncated_prompt_keeps_its_last_tokens(server: RunningServer, tokenizer: Tokenizer) -> None:
    text = " ".join(str(number) for number in range(3000))
    ids = tokenizer.encode([text], add_special_tokens=False)[0].tolist()
    assert len(ids) > 2048
    for prompt in (text, ids, [text], [ids]):
        server.manager.submits.clear()
        status, answer = server.post("/v1/completions", completion_body(prompt=prompt, truncate_prompt_tokens=7))
        assert status == 200, answer
        assert server.manager.submits[0].prompt_ids.tolist() == ids[-7:]
        server.post("/v1/completions", completion_body(prompt=prompt, truncate_prompt_tokens=-1, max_tokens=48))
        assert server.manager.submits[1].prompt_ids.tolist() == ids[-2000:]
    server.manager.submits.clear()
    status, answer = server.post("/v1/completions", completion_body(prompt=text, truncate_prompt_tokens=3, echo=True))
    assert answer["choices"][0]["text"].startswith(tokenizer.text_of(server.manager.submits[0].prompt_ids))
    status, _ = server.post("/v1/completions", completion_body(prompt=text))
    assert status == 400


def test_a_truncated_conversation_keeps_its_last_tokens(server: RunningServer) -> None:
    long = [{"role": "user", "content": "word " * 5000}]
    assert server.post(_CHAT, chat_body(messages=long))[0] == 400
    status, _ = server.post(_CHAT, chat_body(messages=long, truncate_prompt_tokens=9))
    assert status == 200
    assert len(server.manager.submits[0].prompt_ids) == 9


def test_special_tokens_are_added_as_the_request_says(tokenizer_dir: Path, tmp_path: Path) -> None:
    import json

    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with running_server(tmp_path) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, [5])

        def first_id(path: str, **fields: Any) -> int:
            server.manager.submits.clear()
            body = completion_body(**fields) if path == "/v1/completions" else chat_body(**fields)
            assert server.post(path, body)[0] == 200
            return int(server.manager.submits[0].prompt_ids[0])

        assert first_id("/v1/completions") == 1
        assert first_id("/v1/completions", add_special_tokens=True) == 1
        assert first_id("/v1/completions", add_special_tokens=False) != 1
        assert first_id(_CHAT) != 1
        assert first_id(_CHAT, add_special_tokens=True) == 1
        status, answer = server.post("/tokenize", {"prompt": "Hello"})
        assert (status, answer["tokens"][0]) == (200, 1)
        _, answer = server.post("/tokenize", {"prompt": "Hello", "add_special_tokens": False})
        assert answer["tokens"][0] != 1
