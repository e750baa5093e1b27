"""The server has grammars compiled by a process of their own, which may be lost without harm to anybody else."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from toka_engine.grammar.compiling import GrammarError, compile_grammar, load_vocabulary
from toka_engine.grammar.protocol import Setup
from toka_engine.grammar.source import GrammarSource
from toka_engine.messages import FINISH_GRAMMAR, Submit
from toka_engine.server import grammar_checks
from toka_engine.server.errors import ApiError
from toka_engine.server.grammar_checks import GrammarChecks
from toka_engine.server.grammar_requests import AskedGrammar

from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import RunningServer, running_server, streams_of, whole

_COMPLETIONS = "/v1/completions"


def checkers(server: RunningServer) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "toka_engine.grammar" in child.cmdline()]


def ask(server: RunningServer, **fields: Any) -> tuple[int, Any]:
    return server.post(_COMPLETIONS, completion_body(**fields))


def test_a_grammar_that_compiles_goes_to_the_manager_with_the_models_end(server: RunningServer) -> None:
    status, _ = ask(server, guided_regex="a+b")
    assert status == 200
    (submit,) = server.manager.submits
    assert submit.grammar is not None
    assert (submit.grammar.kind, submit.grammar.text) == ("regex", "a+b")
    assert submit.grammar.end_ids == submit.stop_ids


def test_one_process_stays_for_the_next_grammar(server: RunningServer) -> None:
    for regex in ("a", "b", "c"):
        assert ask(server, guided_regex=regex)[0] == 200
    assert len(checkers(server)) == 1


def test_its_process_stands_back_behind_the_servers(server: RunningServer) -> None:
    assert ask(server, guided_regex="a")[0] == 200
    (checker,) = checkers(server)
    assert checker.nice() == min(19, psutil.Process(server.process.pid).nice() + 5)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "start: none"}, "guided_grammar", "none"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no text fits"),
        ({"guided_json": {"$ref": "#/$defs/none"}}, "guided_json", "none"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "nonsense"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        ({"guided_regex": "a", "min_tokens": 5}, "min_tokens", "guided_regex"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids", "guided_regex"),
    ],
)
def test_a_grammar_that_does_not_compile_is_a_400_with_the_reason(
    server: RunningServer, fields: dict[str, Any], param: str, words: str
) -> None:
    for _ in range(2):  # the second time from memory
        status, answer = ask(server, **fields)
        assert (status, answer["error"]["param"]) == (400, param)
        assert words in answer["error"]["message"]
    assert not server.manager.submits


def test_a_lenient_schema_names_what_is_not_enforced_in_a_header(server: RunningServer) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "nonsense"}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = json.dumps(chat_body(response_format=form)).encode()
    status, headers, _ = server.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    assert status == 200
    ignored = headers["x-toka-ignored"].split(",")
    assert [name.strip().rpartition(".")[2] for name in ignored] == ["uniqueItems", "format"]


def test_a_grammar_that_fails_an_assertion_of_the_library_is_refused_without_its_stack(tokenizer_dir: Path) -> None:
    vocabulary = load_vocabulary(tokenizer_dir, 49152, (2,))
    source = GrammarSource("lark", "start: " + "(a|b)" * 70_000 + '\na: "a"\nb: "b"')
    with pytest.raises(GrammarError) as caught:
        compile_grammar(source, vocabulary)
    assert "too much for the grammar library (assertion failed" in str(caught.value)
    assert "backtrace" not in str(caught.value)


def ask_until_checked(server: RunningServer, **body: Any) -> tuple[int, Any]:
    """Ask again, as clients do, where the process that checks got too little of the CPU."""
    while (answer := ask(server, **body))[0] == 503:
        assert "overloaded" in answer[1]["error"]["message"]
    return answer


BOMBS: dict[str, dict[str, Any]] = {
    "nested repetitions": {"guided_regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"},
    "ambiguous repetitions": {"guided_regex": "(.*a){40}.{200}b"},
    "alternatives": {"guided_regex": "(" + "|".join("a" * n + ".*b" for n in range(1, 60)) + ")*c.{900}"},
    "ten thousand values": {"guided_json": {"enum": [f"value {n} {n * 7919 % 10007}" for n in range(10_000)]}},
    "products of alternatives": {
        "guided_json": {
            "allOf": [
                {"anyOf": [{"properties": {f"{i}{j}": {"type": "string"}}} for j in range(12)]} for i in range(12)
            ]
        }
    },
    "two thousand properties": {"guided_json": {"properties": {f"p{n}": {"type": "string"} for n in range(2000)}}},
    "lark": {"guided_grammar": "start: a{1,9999}\na: b{1,9999}\nb: c{1,9999}\nc: /[a-z]*x[a-z]{900}/"},
    "recursion": {"guided_grammar": "start: start start | a\na: a a | start"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_answered_soon_and_the_server_lives_on(server: RunningServer, name: str) -> None:
    begin = time.monotonic()
    status, answer = ask_until_checked(server, **BOMBS[name])
    assert status in (200, 400), answer
    assert time.monotonic() - begin < 60.0
    if status == 400:
        assert answer["error"]["param"] == next(iter(BOMBS[name]))
    assert ask_until_checked(server, guided_regex="[ab]")[0] == 200


BUSY = """
import sys
from toka_engine.grammar.protocol import LENGTH, Verdict
import msgspec
with open(sys.argv[1], "a") as starts:
    starts.write("x")
def read():
    return sys.stdin.buffer.read(LENGTH.unpack(sys.stdin.buffer.read(LENGTH.size))[0])
read()
body = msgspec.msgpack.encode(Verdict())
sys.stdout.buffer.write(LENGTH.pack(len(body)) + body)
sys.stdout.buffer.flush()
read()
while True:
    pass
"""
"""A checker that never ends with its first source: the library has limits of its own, so no real one is known."""


async def test_a_grammar_that_takes_too_much_is_refused_for_a_while_without_another_try(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    monkeypatch.setattr(grammar_checks, "COMMAND", (sys.executable, "-c", BUSY, str(starts)))
    checks = GrammarChecks(Setup(str(tokenizer_dir), 49152, (2,)))
    asked = AskedGrammar(GrammarSource("regex", "x+"), "guided_regex")

    async def code_of_answer() -> str | None:
        with pytest.raises(ApiError) as caught:
            await checks.check(asked)
        return caught.value.code

    while (code := await code_of_answer()) == "unavailable":  # it got too little of the CPU to be blamed
        pass
    assert code == "grammar_too_complex"
    tried = starts.read_text()
    assert await code_of_answer() == "grammar_too_complex"
    assert starts.read_text() == tried, "it was tried again"


def hungry_schema(title: str) -> dict[str, Any]:
    """A schema of an allowed size whose compilation takes some ten megabytes, and little time."""
    return {"title": title, "enum": [f"{number * 7919:060}" for number in range(10_000)]}


def leave_room(checker: psutil.Process, num_bytes: int) -> None:
    """Lower the limit of memory of a checker that runs: no schema of an allowed size is known to reach its own."""
    _, hard = resource.prlimit(checker.pid, resource.RLIMIT_AS)
    resource.prlimit(checker.pid, resource.RLIMIT_AS, (checker.memory_info().vms + num_bytes, hard))


def ask_without_room(server: RunningServer, title: str) -> tuple[int, Any]:
    """Ask for a hungry schema of a new process, none of whose memory is free, that may take no more. Ask again where it
    got too little of the CPU.
    """
    while True:
        old = checkers(server)
        for checker in old:
            checker.kill()
        psutil.wait_procs(old, timeout=30)
        assert ask_until_checked(server, guided_regex=f"before the {title}|{time.monotonic()}")[0] == 200
        (checker,) = checkers(server)
        leave_room(checker, 4 << 20)
        status, answer = ask(server, guided_json=hungry_schema(title))
        psutil.wait_procs([checker], timeout=30)
        assert checker not in checkers(server)  # so that its memory is back
        if status != 503:
            return status, answer


def test_a_grammar_that_runs_out_of_memory_is_a_400_by_its_field_and_others_are_served(server: RunningServer) -> None:
    statuses, over = [ask(server)[0]], threading.Event()

    def ask_plainly() -> None:
        while not over.is_set():
            statuses.append(ask(server)[0])

    before = psutil.Process(server.process.pid).memory_info().rss
    thread = threading.Thread(target=ask_plainly)
    thread.start()
    try:
        for title in ("first", "second", "third"):
            status, answer = ask_without_room(server, title)
            assert (status, answer["error"]["param"]) == (400, "guided_json"), answer
            assert answer["error"]["code"] == "grammar_too_complex"
    finally:
        over.set()
        thread.join()
    assert set(statuses) == {200}
    assert ask_until_checked(server, guided_json=hungry_schema("with room"))[0] == 200
    assert psutil.Process(server.process.pid).memory_info().rss < before + 20e6


def test_a_process_that_stands_still_is_replaced_and_its_grammar_is_not_to_blame(server: RunningServer) -> None:
    assert ask(server, guided_regex="x+")[0] == 200
    (checker,) = checkers(server)
    checker.suspend()
    answers: list[tuple[int, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server, guided_regex="y+")))
    thread.start()
    assert ask(server)[0] == 200  # meanwhile others are served
    thread.join(60)
    (status, answer), left = answers[0], checkers(server)
    assert (status, answer["error"]["code"]) == (503, "unavailable")
    assert left == []
    assert ask_until_checked(server, guided_regex="y+")[0] == 200


def test_a_process_that_is_killed_while_it_waits_costs_no_grammar_anything(server: RunningServer) -> None:
    assert ask(server, guided_regex="lost")[0] == 200
    for regex in ("lost again", "and again"):
        (checker,) = checkers(server)
        os.kill(checker.pid, signal.SIGKILL)
        psutil.wait_procs([checker], timeout=30)
        assert ask(server, guided_regex=regex)[0] == 200
        assert checker.pid not in [process.pid for process in checkers(server)]


def test_a_grammar_that_fails_while_it_is_followed_is_a_500_that_nobody_retries(server: RunningServer) -> None:
    def fail(submit: Submit) -> None:
        server.manager.send(*(whole(stream, [], FINISH_GRAMMAR) for stream in streams_of(submit)))

    server.manager.on_submit = fail
    body = json.dumps(completion_body(guided_regex="a+")).encode()
    status, headers, raw = server.request("POST", _COMPLETIONS, body, {"content-type": "application/json"})
    assert (status, json.loads(raw)["error"]["code"]) == (500, "grammar_failed")
    assert headers["x-should-retry"] == "false"


def test_the_process_ends_with_the_server(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir) as server:
        server.manager.on_submit = lambda submit: server.manager.send(
            *(whole(stream, [5]) for stream in streams_of(submit))
        )
        assert ask(server, guided_regex="a")[0] == 200
        found = checkers(server)
        assert len(found) == 1
    psutil.wait_procs(found, timeout=30)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)
