"""API keys with names and limits: their file and what is wrong with one, reloads, limits, log and metrics."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from toka_engine.control_messages import Failed
from toka_engine.errors import ConfigError, ExitCode
from toka_engine.messages import FINISH_ERROR, Refused, Submit
from toka_engine.server.errors import ApiError
from toka_engine.server.keys.file import MAX_KEYS, ApiKey, KeyFileError, KeySource, parse_keys, read_variable
from toka_engine.server.keys.use import KeyUse

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import (
    MODEL,
    RunningServer,
    ScriptedManager,
    each,
    end,
    running_server,
    speak,
    streams_of,
    wait_until,
)

_COMPLETIONS = "/v1/completions"
_ALICE = {"name": "alice", "key": "sk-alice"}
_BOB = {"name": "bob", "key": "sk-bob"}


def _document(*keys: dict[str, Any]) -> str:
    return json.dumps({"keys": keys})


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", "content-type": "application/json"}


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"sk-\xff", "line 1 is not UTF-8"),
        (b'{"keys": [\n{"name": "\xe9"}]}', "line 2 is not UTF-8"),
        (b"sk-a\nsk-b\n", "must be one key on one line"),
        (b"sk a", "the key has a space"),
        (b"x" * 2000, "the key has more than 1024 characters"),
        (b'{"keys": [\n  {"name": "a" "key": "b"}]}', "line 2, column 16 is no JSON"),
        (b'{"keys": [', "is no JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"keys": ' + b"1" * 10_000 + b"}", "a number that is too long"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `keys`"),
        (b'{"keys": []}', "keys: there is none"),
        (b'{"keys": [{}]}', "keys[0]: Object missing required field `name`"),
        (b'{"keys": [{"name": "a"}]}', "keys[0]: Object missing required field `key`"),
        (b'{"keys": [{"name": "a", "key": 7}]}', "keys[0].key: Expected `str`, got `int`"),
        (b'{"keys": [{"name": "a", "key": ""}]}', "keys[0].key: is empty"),
        (b'{"keys": [{"name": "", "key": "k"}]}', "keys[0].name: must be 1 to 64"),
        (b'{"keys": [{"name": "a b", "key": "k"}]}', "keys[0].name: must be 1 to 64"),
        (b'{"keys": [{"name": "a", "key": "k", "owner": "a\\nb"}]}', "keys[0].owner: must be"),
        (b'{"keys": [{"name": "a", "key": "k", "max_requests": 0}]}', "keys[0].max_requests: Expected `int` >= 1"),
        (b'{"keys": [{"name": "a", "key": "k", "max_tokens_per_minute": 1.5}]}', "keys[0].max_tokens_per_minute"),
        (b'{"keys": [{"name": "a", "key": "k", "limit": 1}]}', "keys[0]: has an unknown field"),
        (b'{"keys": [{"name": "a", "key": "k"}], "sk-misplaced": 1}', "has an unknown field; its fields are keys"),
        (b'{"keys": [{"name": "a", "key": "k", "key": "sk-misplaced"}]}', "an object has the field 'key' twice"),
        (
            b'{"keys": [{"name": "a", "key": "k"}, {"name": "a", "key": "l"}]}',
            "keys[1].name: it is the name of keys[0]",
        ),
        (b'{"keys": [{"name": "a", "key": "k"}, {"name": "b", "key": "k"}]}', "keys[1].key: it is the key of keys[0]"),
        (_document(*({"name": f"n{n}", "key": f"k{n}"} for n in range(MAX_KEYS + 1))).encode(), "more than 1000"),
        (b" " * (1024 * 1024 + 1), "has more than 1048576 bytes"),
        (json.dumps(dict.fromkeys(map(str, range(50_000)))).encode(), "has an unknown field; its fields are keys"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_the_place_and_no_key(data: bytes, words: str) -> None:
    with pytest.raises(KeyFileError) as refusal:
        parse_keys(data, "/etc/keys")
    message = str(refusal.value)
    assert message.startswith("api_keys_file /etc/keys: ")
    assert words in message
    assert "misplaced" not in message
    assert "\n" not in message


def test_a_file_may_have_one_key_alone_or_several_with_names() -> None:
    assert parse_keys(b"sk-one\n", "f") == (ApiKey(name="default", key="sk-one"),)
    assert parse_keys("\ufeffsk-é\r\n".encode(), "f") == (ApiKey(name="default", key="sk-é"),)
    both = parse_keys(_document({**_ALICE, "max_requests": 2, "owner": "team"}, _BOB).encode(), "f")
    assert both == (ApiKey(**_ALICE, max_requests=2, owner="team"), ApiKey(**_BOB))


@pytest.mark.parametrize("value", ["sk-a\n", " sk-a", "a b"])
def test_a_key_in_the_environment_that_nobody_could_send_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="TOKA_API_KEY"):
        read_variable(value)


def test_a_file_is_read_again_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    source = KeySource(path)
    for _ in range(2):
        with pytest.raises(KeyFileError, match="cannot be read: No such file"):
            source.read_if_changed()
        assert source.read_if_changed() is None
        path.write_text("sk-a")
        assert source.read_if_changed() == (ApiKey(name="default", key="sk-a"),)
        assert source.read_if_changed() is None
        path.write_text('{"keys')
        with pytest.raises(KeyFileError, match="no JSON"):
            source.read_if_changed()
        assert source.read_if_changed() is None
        path.unlink()


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.mkdir()
    with pytest.raises(KeyFileError, match="is no file"):
        KeySource(path).read_if_changed()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(KeyFileError, match="is no file"):
        KeySource(pipe).read_if_changed()
    writable = tmp_path / "writable"
    writable.write_text("sk-a")
    writable.chmod(0o646)
    with pytest.raises(KeyFileError, match=r"can be written by every user \(mode 0646\)"):
        KeySource(writable).read_if_changed()


@pytest.mark.parametrize(
    ("content", "env", "words"),
    [
        ('{"keys": [{"name": "a", "key": ""}]}', {}, "keys[0].key: is empty"),
        (None, {}, "cannot be read"),
        ("sk-a", {"TOKA_API_KEY": "sk-b"}, "TOKA_API_KEY are both set"),
    ],
)
def test_the_engine_does_not_start_with_keys_that_are_wrong(
    tokenizer_dir: Path, tmp_path: Path, content: str | None, env: dict[str, str], words: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with running_server(tokenizer_dir, sends_info=False, api_keys_file=str(path), env=env) as server:
        failed = server.wait_control(Failed)
        assert (failed.exit_code, words in failed.message) == (ExitCode.CONFIG_INVALID, True), failed.message


# ---------------------------------------------------------------- limits, by a clock of ours


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _retry_after(use: KeyUse) -> int:
    with pytest.raises(ApiError) as refusal:
        use.enter()
    assert refusal.value.status == 429
    return int(dict(refusal.value.headers)[b"retry-after"])


def test_tokens_come_back_evenly_and_a_debt_is_paid_off_first() -> None:
    clock = _Clock()
    use = KeyUse(ApiKey(name="a", key="k", max_tokens_per_minute=600), clock)
    use.enter()
    use.take(900)  # more than a minute's: a request's tokens are known at its end
    assert _retry_after(use) == 31
    clock.now += 30
    assert _retry_after(use) == 1
    clock.now += 1
    use.enter()
    use.take(10)
    assert _retry_after(use) == 1
    clock.now += 3600
    use.take(599)
    use.enter()
    use.take(1)
    assert _retry_after(use) == 1


@pytest.mark.parametrize("debt", [0, 1, 599, 600, 601, 12345])
def test_the_time_that_a_refusal_names_is_enough(debt: int) -> None:
    clock = _Clock()
    use = KeyUse(ApiKey(name="a", key="k", max_tokens_per_minute=600), clock)
    use.take(600 + debt)
    wait_s = _retry_after(use)
    clock.now += wait_s - 1
    if wait_s > 1:
        _retry_after(use)
    clock.now += 1
    use.enter()


def test_over_an_hour_no_more_is_used_than_the_limit_allows() -> None:
    clock = _Clock()
    use = KeyUse(ApiKey(name="a", key="k", max_tokens_per_minute=1000), clock)
    used = 0
    for _ in range(36_000):
        clock.now += 0.1
        try:
            use.enter()
        except ApiError:
            continue
        use.take(170)
        use.leave()
        used += 170
    assert 60_000 <= used <= 61_000 + 170


def test_other_limits_leave_what_was_used_up() -> None:
    clock = _Clock()
    use = KeyUse(ApiKey(name="a", key="k", max_tokens_per_minute=600), clock)
    use.take(600)
    use.change(ApiKey(name="a", key="k", max_tokens_per_minute=1200))
    use.enter()
    use.take(600)
    assert _retry_after(use) == 1
    use.change(ApiKey(name="a", key="k", max_tokens_per_minute=60))
    assert _retry_after(use) > 60
    use.change(ApiKey(name="a", key="k"))
    use.enter()


# ---------------------------------------------------------------- a server


class KeyedServer:
    """A server whose keys come from a file that tests replace."""

    def __init__(self, server: RunningServer, path: Path, log: Path) -> None:
        self._server, self.path, self.log = server, path, log
        self._text = self._wanted = path.read_text()

    @property
    def manager(self) -> ScriptedManager:
        return self._server.manager

    @property
    def server(self) -> RunningServer:
        """The process, with the keys that the test has asked for."""
        if self._wanted != self._text:
            self.put(self._wanted)
        return self._server

    def begin(self, text: str) -> None:
        """Have the file begin a test with this text, unless that replaces it before it asks for anything: the server
        takes a second to see each change."""
        self._wanted = text

    def put(self, text: str, *, result: str = "ok") -> None:
        """Replace the file; return when the server has read it."""
        self._text = self._wanted = text
        before = self.metric("toka_api_keys_reloads_total", result=result)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(0o600)
        fresh.replace(self.path)
        wait_until(lambda: self.metric("toka_api_keys_reloads_total", result=result) > before)

    def metric(self, name: str, **labels: str) -> float:
        text = self.server.request("GET", "/metrics")[2].decode()
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        found = re.search(rf"^{re.escape(f'{name}{{{shown}}}' if shown else name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def status(self, key: str | None, path: str = "/v1/models") -> int:
        return self.server.request("GET", path, None, {} if key is None else _bearer(key))[0]

    def complete(self, key: str, path: str = _COMPLETIONS, **fields: Any) -> tuple[int, dict[str, str], Any]:
        body = chat_body(**fields) if "chat" in path else completion_body(**fields)
        status, headers, answer = self.server.request("POST", path, json.dumps(body).encode(), _bearer(key))
        return status, headers, json.loads(answer)


def _start(tokenizer_dir: Path, folder: Path, sentence_ids: list[int], **settings: Any) -> Iterator[KeyedServer]:
    path, log = folder / "keys", folder / "log"
    path.write_text(_document(_ALICE, _BOB))
    path.chmod(0o600)
    with (
        log.open("wb") as file,
        running_server(tokenizer_dir, stderr=file, api_keys_file=str(path), data_dir=str(folder), **settings) as server,
    ):
        keyed = KeyedServer(server, path, log)
        wait_until(lambda: keyed.status("sk-alice", "/v1/files") == 200)
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        yield keyed


@pytest.fixture(scope="module")
def started(tokenizer_dir: Path, tmp_path_factory: Any, sentence_ids: list[int]) -> Iterator[KeyedServer]:
    yield from _start(tokenizer_dir, tmp_path_factory.mktemp("keys"), sentence_ids)


@pytest.fixture
def keyed(started: KeyedServer, sentence_ids: list[int]) -> KeyedServer:
    started.begin(_document(_ALICE, _BOB))
    manager = started.manager
    manager.forget()
    manager.on_submit = lambda submit: speak(manager, submit, sentence_ids)
    return started


def test_each_key_of_the_file_is_taken_and_no_other(keyed: KeyedServer) -> None:
    assert [keyed.status(key) for key in ("sk-alice", "sk-bob")] == [200, 200]
    wrong = (None, "", "sk-", "sk-alic", "sk-alicee", "alice", "default", "SK-ALICE")
    assert {keyed.status(key) for key in wrong} == {401}


def test_every_route_but_probes_and_documents_asks_for_a_key(keyed: KeyedServer) -> None:
    document = json.loads(keyed.server.request("GET", "/openapi.json")[2])
    asked = {path for path in document["paths"] if keyed.status(None, path) == 401}
    open_paths = {path for path in document["paths"] if path not in asked}
    posts = {path for path in open_paths if keyed.server.request("POST", path, b"{}", {})[0] == 401}
    assert open_paths - posts == {"/ping", "/livez", "/readyz", "/health", "/metrics", "/version", "/load"}


def test_a_reload_brings_keys_and_takes_them_away(keyed: KeyedServer) -> None:
    keyed.put(_document(_BOB, {"name": "carol", "key": "sk-carol"}))
    assert [keyed.status(key) for key in ("sk-alice", "sk-bob", "sk-carol")] == [401, 200, 200]
    keyed.put("sk-alone\n")
    assert [keyed.status(key) for key in ("sk-alone", "sk-bob")] == [200, 401]
    wait_until(
        lambda: "event=api_keys_reloaded keys=1 added=default removed=bob,carol changed=" in keyed.log.read_text()
    )
    assert "sk-" not in keyed.log.read_text()


@pytest.mark.parametrize("broken", ['{"keys": [', "", '{"keys": []}', '{"keys": [{"name": "sk-carol", "key": ""}]}'])
def test_a_broken_file_leaves_the_old_keys_and_is_told(keyed: KeyedServer, broken: str) -> None:
    assert keyed.metric("toka_api_keys_last_reload_successful") == 1
    keyed.put(broken, result="failed")
    assert [keyed.status(key) for key in ("sk-alice", "sk-bob", "sk-carol", "")] == [200, 200, 401, 401]
    assert keyed.metric("toka_api_keys_last_reload_successful") == 0
    wait_until(lambda: "event=api_keys_invalid kept=2" in keyed.log.read_text())
    keyed.put(_document(_ALICE))
    assert keyed.metric("toka_api_keys_last_reload_successful") == 1
    assert [keyed.status(key) for key in ("sk-alice", "sk-bob")] == [200, 401]


def test_a_secrets_links_are_followed(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The kubelet keeps the file behind `..data`, a link to a folder, and swaps that link."""
    for number, keys in enumerate(((_ALICE,), (_BOB,))):
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "keys").write_text(_document(*keys))
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "keys").symlink_to("..data/keys")
    with running_server(tokenizer_dir, api_keys_file=str(tmp_path / "keys")) as server:
        keyed = KeyedServer(server, tmp_path / "keys", tmp_path / "log")
        assert [keyed.status(key) for key in ("sk-alice", "sk-bob")] == [200, 401]
        (tmp_path / "..data_tmp").symlink_to("..1")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        wait_until(lambda: keyed.status("sk-bob") == 200)
        assert keyed.status("sk-alice") == 401


# ---------------------------------------------------------------- limits of a key


def _hold(keyed: KeyedServer, key: str, path: str = _COMPLETIONS, **fields: Any) -> threading.Thread:
    """Begin a request that its manager leaves unanswered; return when the manager has it."""
    manager = keyed.manager
    number = len(manager.submits)
    thread = threading.Thread(target=lambda: keyed.complete(key, path, **fields))
    thread.start()
    manager.wait_for(lambda: len(manager.submits) > number)
    return thread


def test_the_router_of_fastapi_keeps_to_the_limits_too(
    tokenizer_dir: Path, tmp_path: Path, sentence_ids: list[int]
) -> None:
    for routed in _start(tokenizer_dir, tmp_path, sentence_ids, http_fast_path=False):
        _exceed_requests_at_once(routed, sentence_ids, "/v1/chat/completions")


@pytest.mark.parametrize("path", [_COMPLETIONS, "/v1/chat/completions"])
def test_requests_beyond_those_at_once_get_a_429_that_names_the_limit(
    keyed: KeyedServer, sentence_ids: list[int], path: str
) -> None:
    _exceed_requests_at_once(keyed, sentence_ids, path)


def _exceed_requests_at_once(keyed: KeyedServer, sentence_ids: list[int], path: str) -> None:
    keyed.put(_document({**_ALICE, "max_requests": 2}, _BOB))
    manager = keyed.manager
    manager.on_submit = lambda submit: None
    held = [_hold(keyed, "sk-alice") for _ in range(2)]
    assert keyed.metric("toka_key_requests_running", key="alice") == 2
    before = keyed.metric("toka_key_requests_refused_total", key="alice", limit="max_requests")
    status, headers, answer = keyed.complete("sk-alice", path)
    assert (status, headers["retry-after"], headers["x-toka-limit"]) == (429, "1", "max_requests")
    error = answer["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert "'alice'" in error["message"]
    assert "2 requests at once (max_requests)" in error["message"]
    assert keyed.status("sk-alice") == 200  # what generates nothing needs no place
    assert keyed.metric("toka_key_requests_refused_total", key="alice", limit="max_requests") == before + 1
    others = _hold(keyed, "sk-bob")
    for submit in list(manager.submits):
        speak(manager, submit, sentence_ids)
    for thread in (*held, others):
        thread.join(WAIT_S)
    manager.on_submit = lambda submit: speak(manager, submit, sentence_ids)
    assert keyed.complete("sk-alice", path)[0] == 200
    wait_until(lambda: keyed.metric("toka_key_requests_running", key="alice") == 0)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_place_comes_back_when_a_client_leaves(keyed: KeyedServer, is_streamed: bool) -> None:
    keyed.put(_document({**_ALICE, "max_requests": 1}))
    manager = keyed.manager
    manager.on_submit = lambda submit: None
    body = json.dumps(completion_body(stream=is_streamed)).encode()
    head = f"POST {_COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-alice\r\n"
    with keyed.server.connect() as sock:
        sock.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        manager.wait_for(lambda: bool(manager.submits))
        assert keyed.complete("sk-alice")[0] == 429
    wait_until(lambda: keyed.metric("toka_key_requests_running", key="alice") == 0)


def test_a_bad_request_gives_its_place_back_and_costs_nothing(keyed: KeyedServer) -> None:
    keyed.put(_document({**_ALICE, "max_requests": 1, "max_tokens_per_minute": 1}))
    for _ in range(3):
        assert keyed.complete("sk-alice", n=0)[0] == 400
    assert keyed.complete("sk-alice")[0] == 200


def test_tokens_beyond_a_minutes_get_a_429_with_the_time_to_wait(keyed: KeyedServer) -> None:
    keyed.put(_document({"name": "few", "key": "sk-few", "max_tokens_per_minute": 4}, _BOB))
    status, _, answer = keyed.complete("sk-few")
    used = answer["usage"]["total_tokens"]
    assert (status, used > 4) == (200, True)
    wait_until(lambda: keyed.metric("toka_key_completion_tokens_total", key="few") > 0)
    assert keyed.metric("toka_key_prompt_tokens_total", key="few") == answer["usage"]["prompt_tokens"]
    assert keyed.metric("toka_key_completion_tokens_total", key="few") == answer["usage"]["completion_tokens"]
    status, headers, answer = keyed.complete("sk-few")
    assert (status, headers["x-toka-limit"]) == (429, "max_tokens_per_minute")
    assert "4 tokens a minute (max_tokens_per_minute)" in answer["error"]["message"]
    assert 1 < int(headers["retry-after"]) <= (used - 4) * 15 + 1
    assert keyed.complete("sk-bob")[0] == 200


def test_a_stream_that_is_left_costs_what_came(keyed: KeyedServer, sentence_ids: list[int]) -> None:
    keyed.put(_document({"name": "leaver", "key": "sk-leaver"}))
    manager = keyed.manager
    began: list[Submit] = []

    def answer(submit: Submit) -> None:
        began.append(submit)
        manager.send(each(streams_of(submit), sentence_ids[:1]))

    manager.on_submit = answer
    client = openai.OpenAI(base_url=f"{keyed.server.url}/v1", api_key="sk-leaver", max_retries=0, timeout=WAIT_S)
    with client.completions.create(model=MODEL, prompt="Hello", stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: keyed.metric("toka_key_completion_tokens_total", key="leaver") == 1)
    assert keyed.metric("toka_key_prompt_tokens_total", key="leaver") == len(began[0].prompt_ids)


def test_what_the_engine_refuses_costs_nothing(keyed: KeyedServer) -> None:
    keyed.put(_document({"name": "refused", "key": "sk-refused", "max_tokens_per_minute": 1}))
    manager = keyed.manager
    manager.on_submit = lambda submit: manager.send(Refused(submit.first_stream, "The queue is full."))
    assert [keyed.complete("sk-refused")[2]["error"]["code"] for _ in range(3)] == ["queue_full"] * 3
    manager.on_submit = lambda submit: manager.send(end(streams_of(submit), 0, FINISH_ERROR))
    assert keyed.complete("sk-refused")[2]["error"]["code"] == "not_finite"
    assert keyed.metric("toka_key_prompt_tokens_total", key="refused") == 0


def test_a_synchronous_batch_is_one_request_and_all_its_tokens(keyed: KeyedServer) -> None:
    keyed.put(_document({"name": "many", "key": "sk-many", "max_requests": 1, "max_tokens_per_minute": 5}))
    body = json.dumps({"requests": [completion_body(), completion_body()]}).encode()
    path = "/custom/synchronous-batch-completions"
    status, _, answer = keyed.server.request("POST", path, body, _bearer("sk-many"))
    assert status == 200
    total = sum(one["usage"]["completion_tokens"] for one in json.loads(answer))
    wait_until(lambda: keyed.metric("toka_key_completion_tokens_total", key="many") == total)
    assert keyed.server.request("POST", path, body, _bearer("sk-many"))[0] == 429


def test_the_log_has_the_keys_name_and_not_the_key(keyed: KeyedServer) -> None:
    body = json.dumps(completion_body()).encode()
    keyed.server.request("POST", _COMPLETIONS, body, {**_bearer("sk-alice"), "x-request-id": "named"})
    keyed.server.request("POST", _COMPLETIONS, body, {**_bearer("sk-nobody"), "x-request-id": "unnamed"})
    wait_until(lambda: "request_id=unnamed " in keyed.log.read_text())
    lines = {name: line for line in keyed.log.read_text().splitlines() for name in ("named", "unnamed")
             if f"request_id={name} " in line}  # fmt: skip
    assert " key=alice " in lines["named"]
    assert " key=" not in lines["unnamed"]
    assert "sk-" not in keyed.log.read_text()
    assert "sk-" not in keyed.server.request("GET", "/metrics")[2].decode()


def test_series_of_keys_that_are_gone_end(keyed: KeyedServer) -> None:
    for number in range(3):
        keyed.put(_document({"name": f"guest{number}", "key": f"sk-{number}"}))
        assert keyed.complete(f"sk-{number}")[0] == 200
    text = keyed.server.request("GET", "/metrics")[2].decode()
    assert set(re.findall(r'toka_key_requests_total\{key="(\w+)"\}', text)) == {"guest2"}


# ---------------------------------------------------------------- owners


def _upload(keyed: KeyedServer, key: str) -> str:
    client = openai.OpenAI(base_url=f"{keyed.server.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)
    return client.files.create(file=("f.jsonl", b"{}\n"), purpose="batch").id


def test_files_belong_to_the_keys_name_whatever_its_key(keyed: KeyedServer) -> None:
    file_id = _upload(keyed, "sk-alice")
    assert [keyed.status(key, f"/v1/files/{file_id}") for key in ("sk-alice", "sk-bob")] == [200, 404]
    keyed.put(_document({"name": "alice", "key": "sk-rotated"}, _BOB))
    assert [keyed.status(key, f"/v1/files/{file_id}") for key in ("sk-rotated", "sk-bob")] == [200, 404]


def test_files_belong_to_the_owner_that_a_key_names(keyed: KeyedServer) -> None:
    """A key is renamed so, and two keys of one owner overlap while clients change from one to the other."""
    file_id = _upload(keyed, "sk-alice")
    new = {"name": "alice-2027", "key": "sk-new", "owner": "alice"}
    keyed.put(_document(_ALICE, _BOB, new))
    shown = [keyed.status(key, f"/v1/files/{file_id}") for key in ("sk-alice", "sk-new", "sk-bob")]
    assert shown == [200, 200, 404]


def test_a_response_is_its_owners_alone(keyed: KeyedServer) -> None:
    clients = [
        openai.OpenAI(base_url=f"{keyed.server.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)
        for key in ("sk-alice", "sk-bob")
    ]
    response = clients[0].responses.create(model=MODEL, input="Hello")
    assert clients[0].responses.retrieve(response.id).id == response.id
    with pytest.raises(openai.NotFoundError):
        clients[1].responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        clients[1].responses.create(model=MODEL, input="Hello", previous_response_id=response.id)
    with pytest.raises(openai.NotFoundError):
        clients[1].responses.delete(response.id)
    assert clients[0].responses.create(model=MODEL, input="And?", previous_response_id=response.id).id
