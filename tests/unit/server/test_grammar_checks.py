"""The server has grammars compiled by a process of their own, which may be lost without harm to anybody else."""

from __future__ import annotations

import asyncio
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
from toka_engine.server import grammar_checks, helpers
from toka_engine.server.errors import ApiError
from toka_engine.server.grammar_checks import GrammarChecks
from toka_engine.server.grammar_requests import AskedGrammar

from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import WAIT_S, RunningServer, running_server, streams_of, whole

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


CHECKER = """
import os, signal, sys, time
from pathlib import Path
log, first_does = Path(sys.argv[1]), sys.argv[2]
with log.open("a") as starts:
    starts.write("start\\n")
is_first = log.read_text().count("start") == 1
if is_first and first_does == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
if is_first and first_does == "sleep":
    time.sleep(3)
if is_first and first_does == "die":
    sys.exit(1)
from toka_engine.grammar import checker
check = checker.check_source
def check_or_spin(source, vocabulary):
    if source.text.startswith("spin"):
        with log.open("a") as tries:
            tries.write("try\\n")
        while True:
            pass
    if source.text == "doze":
        time.sleep(1000)
    return check(source, vocabulary)
checker.check_source = check_or_spin
checker._MAX_S = float(sys.argv[3])
checker.MAX_CPU_S = 1
checker.run()
"""
"""A checker that never ends with some sources: the library has limits of its own, so no real one is known. The first of
several such checkers may do something else before.
"""


class Checked:
    """Checks with such processes."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        tokenizer_dir: Path,
        first_does: str = "nothing else",
        max_s: float = 90.0,
    ) -> None:
        """`max_s`: wall time of a source: by default all that its CPU time can need on a busy machine."""
        self._log = folder / "log"
        command = (sys.executable, "-c", CHECKER, str(self._log), first_does, str(max_s))
        monkeypatch.setattr(grammar_checks, "COMMAND", command)
        monkeypatch.setattr(grammar_checks, "ANSWER_S", 100.0)
        monkeypatch.setattr(helpers, "_LOOK_S", 0.2)
        self._checks = GrammarChecks(Setup(str(tokenizer_dir), 49152, (2,)))

    async def check(self, regex: str) -> ApiError | None:
        """Return the refusal of a regular expression, or None."""
        try:
            await self._checks.check(AskedGrammar(GrammarSource("regex", regex), "guided_regex"))
        except ApiError as error:
            return error
        return None

    def count(self, what: str) -> int:
        return self._log.read_text().split().count(what)


async def test_a_grammar_that_takes_too_much_is_refused_for_a_while_without_another_try_and_costs_no_process(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Checked(tmp_path, monkeypatch, tokenizer_dir)
    for regex in ("spin", "spin again"):
        error = await checked.check(regex)
        assert error is not None
        assert error.code == "grammar_too_complex"
    num_tries = checked.count("try")
    error = await checked.check("spin")
    assert error is not None
    assert error.code == "grammar_too_complex"
    assert checked.count("try") == num_tries, "it was tried again"
    assert await checked.check("x+") is None
    assert checked.count("start") == 1, "it took its process with it"


async def test_a_grammar_that_got_no_cpu_in_its_time_is_a_503_and_costs_no_process(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Checked(tmp_path, monkeypatch, tokenizer_dir, max_s=0.5)
    for _ in range(2):
        error = await checked.check("doze")
        assert error is not None
        assert error.status == 503
        assert "overloaded" in error.message
    assert checked.count("start") == 1


async def test_a_process_that_is_stopped_while_it_starts_is_given_up_soon(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Checked(tmp_path, monkeypatch, tokenizer_dir, "stop")
    began_s = time.monotonic()
    error = await checked.check("x+")
    assert error is not None
    assert error.status == 503
    assert time.monotonic() - began_s < 30.0, "it was waited for as for one that starts slowly"
    assert await checked.check("x+") is None


async def test_a_process_that_gets_no_cpu_while_it_starts_is_waited_for(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Checked(tmp_path, monkeypatch, tokenizer_dir, "sleep")
    assert await checked.check("x+") is None
    assert checked.count("start") == 1


async def test_a_first_process_that_does_not_start_is_followed_by_another_at_once(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Checked(tmp_path, monkeypatch, tokenizer_dir, "die")
    error = await checked.check("x+")
    assert error is not None
    assert (error.status, error.headers) == (503, ((b"retry-after", b"1"),))
    assert await checked.check("x+") is None
    assert checked.count("start") == 2


async def test_processes_that_do_not_start_are_tried_at_growing_intervals_not_by_each_request(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    dying = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(1)"
    monkeypatch.setattr(grammar_checks, "COMMAND", (sys.executable, "-c", dying, str(starts)))
    checks = GrammarChecks(Setup(str(tokenizer_dir), 49152, (2,)))
    began_s, waits_s = time.monotonic(), set()
    while not starts.exists() or len(starts.read_text()) < 4:
        assert time.monotonic() < began_s + WAIT_S
        with pytest.raises(ApiError) as caught:
            await checks.check(AskedGrammar(GrammarSource("regex", "x+"), "guided_regex"))
        assert caught.value.status == 503
        ((name, value),) = caught.value.headers
        assert name == b"retry-after"
        waits_s.add(int(value))
        await asyncio.sleep(0.01)
    assert time.monotonic() - began_s > 3.0  # one start and the next at once, then pauses of 1 and 2 s
    assert waits_s == {1, 2, 4}


def hungry_schema(title: str) -> dict[str, Any]:
    """A schema of an allowed size whose compilation takes some ten megabytes, and little time."""
    return {"title": title, "enum": [f"{number * 7919:060}" for number in range(10_000)]}


def leave_room(checker: psutil.Process, num_bytes: int) -> None:
    """Lower the limit of memory of a checker that runs: no schema of an allowed size is known to reach its own."""
    _, hard = resource.prlimit(checker.pid, resource.RLIMIT_AS)
    resource.prlimit(checker.pid, resource.RLIMIT_AS, (checker.memory_info().vms + num_bytes, hard))


def test_a_grammar_that_runs_out_of_memory_is_a_400_by_its_field_and_others_are_served(server: RunningServer) -> None:
    statuses, over = [ask(server)[0]], threading.Event()

    def ask_plainly() -> None:
        while not over.is_set():
            statuses.append(ask(server)[0])

    assert ask_until_checked(server, guided_regex="before")[0] == 200
    (checker,) = checkers(server)
    before = psutil.Process(server.process.pid).memory_info().rss
    leave_room(checker, 4 << 20)
    thread = threading.Thread(target=ask_plainly)
    thread.start()
    try:
        for title in ("first", "second", "third"):
            status, answer = ask_until_checked(server, guided_json=hungry_schema(title))
            assert (status, answer["error"]["param"]) == (400, "guided_json"), answer
            assert answer["error"]["code"] == "grammar_too_complex"
    finally:
        over.set()
        thread.join()
    assert set(statuses) == {200}
    leave_room(checker, 384 << 20)
    assert ask_until_checked(server, guided_json=hungry_schema("with room"))[0] == 200
    assert checkers(server) == [checker], "a source took its process with it"
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


def test_the_first_process_killed_while_it_waits_costs_nothing_and_the_next_one_a_pause(
    tokenizer_dir: Path,
) -> None:
    with running_server(tokenizer_dir) as server:
        server.manager.on_submit = lambda submit: server.manager.send(
            *(whole(stream, [5]) for stream in streams_of(submit))
        )
        assert ask(server, guided_regex="lost")[0] == 200
        lost = []
        for _ in range(2):
            (checker,) = checkers(server)
            os.kill(checker.pid, signal.SIGKILL)
            psutil.wait_procs([checker], timeout=30)
            lost.append(ask(server, guided_regex="lost again")[0])  # the second time from memory
            assert checker.pid not in [process.pid for process in checkers(server)]
        assert lost == [200, 200]
        body = json.dumps(completion_body(guided_regex="new")).encode()
        status, headers, raw = server.request("POST", _COMPLETIONS, body, {"content-type": "application/json"})
        assert (status, json.loads(raw)["error"]["code"], headers["retry-after"]) == (503, "unavailable", "1")
        assert ask(server)[0] == 200
        time.sleep(1.0)
        assert ask(server, guided_regex="new")[0] == 200


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
