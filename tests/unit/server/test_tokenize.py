"""The tokenizer's endpoints, and the other small ones that stock clients look for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toka_engine.server import elsewhere
from toka_engine.version import __version__

from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import INFO, MODEL, RunningServer, running_server


def test_a_text_has_the_tokens_of_the_tokenizer(server: RunningServer, sentence_ids: list[int]) -> None:
    status, answer = server.post("/tokenize", {"model": MODEL, "prompt": SENTENCE})
    assert status == 200
    assert answer == {
        "count": len(sentence_ids),
        "max_model_len": INFO.max_request_tokens,
        "tokens": sentence_ids,
        "token_strs": None,
    }
    status, back = server.post("/detokenize", {"model": MODEL, "tokens": answer["tokens"]})
    assert (status, back) == (200, {"prompt": SENTENCE})


def test_a_conversation_has_the_tokens_of_its_prompt(server: RunningServer) -> None:
    server.post("/v1/chat/completions", chat_body())
    messages = chat_body()["messages"]
    _, answer = server.post("/tokenize", {"messages": messages, "return_token_strs": True})
    assert answer["tokens"] == server.manager.submits[0].prompt_ids.tolist()
    assert answer["token_strs"][0] == "<|im_start|>"
    assert server.post("/detokenize", {"tokens": answer["tokens"]})[1]["prompt"] == "".join(answer["token_strs"])


def test_a_text_longer_than_the_context_is_counted(server: RunningServer) -> None:
    text = "word " * 5000
    status, answer = server.post("/tokenize", {"prompt": text})
    assert (status, answer["count"] > INFO.max_request_tokens) == (200, True)
    status, answer = server.post("/tokenize", {"messages": [{"role": "user", "content": text}]})
    assert (status, answer["count"] > INFO.max_request_tokens) == (200, True)
    status, answer = server.post("/tokenize", {"prompt": ""})
    assert (status, answer["tokens"]) == (200, [])


_WRONG: dict[str, tuple[str, Any, int, str | None]] = {
    "nothing": ("/tokenize", {}, 400, "prompt"),
    "both": ("/tokenize", {"prompt": "x", "messages": []}, 400, "messages"),
    "no-messages": ("/tokenize", {"messages": []}, 400, "messages"),
    "model": ("/tokenize", {"model": "gpt-4", "prompt": "x"}, 404, "model"),
    "list": ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
    "unknown": ("/tokenize", {"prompt": "x", "add_specials_tokens": True}, 400, "add_specials_tokens"),
    "huge": ("/tokenize", {"prompt": "x" * 20_000_000}, 400, "prompt"),
    "no-tokens": ("/detokenize", {}, 400, "tokens"),
    "texts": ("/detokenize", {"tokens": ["x"]}, 400, "tokens[0]"),
    "negative": ("/detokenize", {"tokens": [5, -1]}, 400, "tokens"),
    "too-large": ("/detokenize", {"tokens": [INFO.vocab_size]}, 400, "tokens"),
    "too-many": ("/detokenize", {"tokens": [5] * 1_048_577}, 400, "tokens"),
    "null": ("/detokenize", {"tokens": None}, 400, "tokens"),
}


@pytest.mark.parametrize(("path", "body", "status", "param"), _WRONG.values(), ids=_WRONG)
def test_a_wrong_question_is_refused_by_name(
    server: RunningServer, path: str, body: Any, status: int, param: str | None
) -> None:
    found, answer = server.post(path, body)
    assert (found, answer["error"]["param"]) == (status, param), answer


def test_the_tokenizer_describes_itself(server: RunningServer, tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    info = json.loads(server.request("GET", "/tokenizer_info")[2])
    reference = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert info["chat_template"] == reference.chat_template
    assert (info["bos_token"], info["eos_token"]) == (reference.bos_token, reference.eos_token)


def test_health_is_readiness_without_words(server: RunningServer, tokenizer_dir: Path) -> None:
    assert server.request("GET", "/health")[::2] == (200, b"")
    with running_server(tokenizer_dir, sends_info=False) as starting:
        while True:
            try:
                status, _, body = starting.request("GET", "/health")
                break
            except ConnectionRefusedError:
                continue
        assert (status, body) == (503, b"")


def test_the_version_is_the_engines(server: RunningServer) -> None:
    status, _, body = server.request("GET", "/version")
    assert (status, json.loads(body)) == (200, {"version": __version__})


def test_the_tokenizer_asks_for_the_key_and_health_does_not(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, env={"TOKA_API_KEY": "key"}) as server:
        for method, path in (("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")):
            assert server.request(method, path)[0] == 401
        assert server.request("GET", "/health")[0] == 200
        assert server.request("GET", "/version")[0] == 200
        assert server.request("GET", "/load")[0] == 200


@pytest.mark.parametrize(
    ("path", "words"),
    {
        "/v1/embeddings": "no embeddings",
        "/embeddings": "no embeddings",
        "/v1/images/generations": "text alone",
        "/v1/audio/speech": "text alone",
        "/v1/moderations": "no moderation",
        "/v1/engines/smollm2/completions": "/v1/completions",
        "/v1/assistants": "/v1/chat/completions",
        "/v1/assistants/asst_1/files": "/v1/chat/completions",
        "/v1/threads/thread_1/runs": "/v1/chat/completions",
        "/v1/conversations": "previous_response_id",
        "/v1/conversations/conv_1/items": "previous_response_id",
        "/v1/responses/resp_1/cancel": "close the connection",
        "/v1/chat/completions/chatcmpl-1": "not kept",
        "/v1/chat/completions/chatcmpl-1/messages": "not kept",
        "/v1/chat/completions/batch": "/v1/batches",
        "/v1/messages/batches": "/v1/batches",
        "/v1/fine_tuning/jobs": "does not train",
        "/v1/vector_stores/vs_1/search": "searches no files",
        "/v1/videos": "text alone",
        "/v1/evals": "lm-eval",
        "/v1/containers": "runs no code",
        "/v1/organization/usage/completions": "/metrics",
        "/v1/load_lora_adapter": "adapter",
        "/rerank": "no reranking",
        "/v2/rerank": "no reranking",
        "/score": "no scoring",
        "/pooling": "no pooled states",
        "/classify": "guided_choice",
        "/generate": "/v1/completions",
        "/api/chat": "Ollama",
        "/reset_prefix_cache": "use_prefix_cache",
        "/sleep": "command line",
        "/server_info": "/version",
    }.items(),
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_path_of_openai_that_is_not_served_names_the_way_out(
    server: RunningServer, method: str, path: str, words: str
) -> None:
    status, _, raw = server.request(method, path)
    error = json.loads(raw)["error"]
    assert (status, error["code"]) == (404, "not_supported")
    assert words in error["message"]


def test_each_line_of_paths_that_are_not_served_is_found_and_is_no_path_of_ours(server: RunningServer) -> None:
    for path, instead in elsewhere._ELSEWHERE.items():
        asked = path.replace("*", "x1")
        assert elsewhere.find_instead(asked) == elsewhere.find_instead(asked + "/below/") == instead
        error = json.loads(server.request("POST", asked)[2])["error"]
        assert error["message"] == f"There is no {asked}: {instead}."


def test_the_load_is_the_number_of_generating_requests(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir) as server, server.connect() as first, server.connect() as second:
        assert json.loads(server.request("GET", "/load")[2]) == {"server_load": 0}
        body = json.dumps(completion_body(n=3)).encode()
        for sock in (first, second):
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
                + b"%d\r\n\r\n" % len(body)
                + body
            )
        server.manager.wait_for(lambda: len(server.manager.submits) == 2)
        assert json.loads(server.request("GET", "/load")[2]) == {"server_load": 2}
        first.close()
        server.manager.wait_for(lambda: len(server.manager.cancelled) == 3)
        assert json.loads(server.request("GET", "/load")[2]) == {"server_load": 1}


# ---------------------------------------------------------------- pages of other origins

_PREFLIGHT = {
    "origin": "https://chat.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}
_POST = {"content-type": "application/json", "origin": "https://chat.example"}


@pytest.fixture(scope="module")
def open_server(tokenizer_dir: Path) -> Iterator[RunningServer]:
    with running_server(
        tokenizer_dir, cors_origins=("https://chat.example", "https://b.example"), env={"TOKA_API_KEY": "key"}
    ) as server:
        yield server


def test_a_page_of_an_allowed_origin_may_ask(open_server: RunningServer) -> None:
    status, headers, _ = open_server.request("OPTIONS", "/v1/chat/completions", None, _PREFLIGHT)  # without a key
    assert status == 200
    assert headers["access-control-allow-origin"] == "https://chat.example"
    assert headers["access-control-allow-headers"] == _PREFLIGHT["access-control-request-headers"]
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["vary"] == "origin"
    status, headers, _ = open_server.request("POST", "/v1/chat/completions", b"{}", _POST)
    assert status == 401
    assert headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-request-id" in headers["access-control-expose-headers"]
    assert open_server.request("GET", "/v1/nothing", None, _POST)[1]["access-control-allow-origin"]


def test_a_page_of_another_origin_may_not(open_server: RunningServer) -> None:
    for origin in ("https://evil.example", "null", "https://chat.example.evil", ""):
        _, headers, _ = open_server.request("OPTIONS", "/v1/models", None, {**_PREFLIGHT, "origin": origin})
        assert "access-control-allow-origin" not in headers
        assert headers["vary"] == "origin"


def test_without_the_key_no_origin_is_allowed(server: RunningServer) -> None:
    status, headers, _ = server.request("OPTIONS", "/v1/chat/completions", None, _PREFLIGHT)
    assert status == 405
    assert not any(name.startswith("access-control") or name == "vary" for name in headers)


def test_an_asterisk_allows_every_origin(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, cors_origins=("*",)) as server:
        status, headers, _ = server.request("OPTIONS", "/v1/chat/completions", None, _PREFLIGHT)
        assert (status, headers["access-control-allow-origin"]) == (200, "*")
        _, headers, _ = server.request(
            "OPTIONS", "/v1/models", None, {**_PREFLIGHT, "access-control-request-headers": "a;b"}
        )
        assert headers["access-control-allow-headers"] == "authorization, content-type"
