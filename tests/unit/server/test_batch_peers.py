"""Files and batches of several replicas behind one address: real server processes that are each other's peers."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from toka_engine.control_messages import Drained
from toka_engine.errors import ConfigError
from toka_engine.server.batches import peers
from toka_engine.server.batches.cursor import Cursor
from toka_engine.server.batches.peers import FIND_AGAIN_S, Peers
from toka_engine.server.batches.records import new_batch_id, new_file_id, ordinal_of
from toka_engine.server.errors import ApiError

from tests.engine_process import WAIT_S, hold_port
from tests.unit.server.harness import RunningServer, speak
from tests.unit.server.test_batches import client_of, line_of, results_of, start_batch, wait_until


class Deployment:
    """Replicas that know each other by a list of addresses, each with a folder of its ordinal."""

    def __init__(self, tokenizer_dir: Path, root: Path, ids: list[int], number: int) -> None:
        self._tokenizer_dir, self._root, self._ids = tokenizer_dir, root, ids
        held = [hold_port() for _ in range(number + 1)]
        self._held = [holder for holder, _ in held]
        self.ports = [port for _, port in held]
        """One for each ordinal, and one more for a successor."""
        self.servers: list[RunningServer] = []

    def start(self, ordinal: int, port: int | None = None, **settings: Any) -> RunningServer:
        names = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        env = {"TOKA_ORDINAL": str(ordinal), "TOKA_PEERS": names, **settings.pop("env", {})}
        server = RunningServer(
            self._tokenizer_dir,
            port=port or self.ports[ordinal],
            env=env,
            answer=partial(speak, ids=self._ids),
            data_dir=str(self._root / str(ordinal)),
            drain_endpoint_delay_s=0,
            **settings,
        )
        self.servers.append(server)
        return server

    def forget(self, port: int) -> None:
        """Leave a port out of the addresses, as DNS does with pods that are not."""
        self.ports.remove(port)

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
        for holder in self._held:
            holder.close()


@pytest.fixture(scope="module")
def make(
    tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory, sentence_ids: list[int]
) -> Iterator[Callable[[int], Deployment]]:
    made: list[Deployment] = []

    def begin(number: int) -> Deployment:
        deployment = Deployment(tokenizer_dir, tmp_path_factory.mktemp("replicas"), sentence_ids, number)
        made.append(deployment)
        return deployment

    yield begin
    for deployment in made:
        deployment.stop()


@pytest.fixture(scope="module")
def pair(make: Callable[[int], Deployment]) -> tuple[RunningServer, RunningServer]:
    deployment = make(2)
    deployment.forget(deployment.ports[2])
    first, second = deployment.start(0), deployment.start(1)
    for server in (first, second):
        wait_own(server)
    return first, second


def wait_own(server: RunningServer) -> None:
    """Wait until a replica has its own folder, whatever the others have."""
    deadline = time.monotonic() + WAIT_S
    while server.request("GET", "/v1/files/file-none")[0] == 503:
        assert time.monotonic() < deadline, "the folder did not open"
        time.sleep(0.02)  # the folder opens beside the start


def clients_of(*servers: RunningServer, key: str = "none") -> list[openai.OpenAI]:
    return [client_of(server, key) for server in servers]


# ---------------------------------------------------------------- one deployment


def test_a_file_of_one_replica_becomes_a_batch_through_another_and_any_answers_for_it(
    pair: tuple[RunningServer, RunningServer],
) -> None:
    first, second = clients_of(*pair)
    num_before = len(pair[0].manager.submits)
    lines = [line_of(f"line-{number}") for number in range(40)]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = second.files.create(file=("../requests.jsonl", data), purpose="batch")
    assert ordinal_of(file.id) == 1
    assert first.files.retrieve(file.id) == file
    assert first.files.content(file.id).content == data
    wanted: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h"}
    batch = first.batches.create(input_file_id=file.id, metadata={"run": "1"}, **wanted)
    assert ordinal_of(batch.id) == 1
    assert batch.metadata == {"run": "1"}
    for client in (first, second):
        done = wait_until(client, batch.id, "completed")
        assert set(results_of(client, done.output_file_id)) == {line["custom_id"] for line in lines}
    assert len(pair[0].manager.submits) == num_before, "the replica that has the file does the work"
    with pytest.raises(openai.ConflictError):
        first.batches.cancel(batch.id)
    assert first.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        second.files.retrieve(file.id)


def test_a_running_batch_of_another_replica_is_cancelled(pair: tuple[RunningServer, RunningServer]) -> None:
    first, second = clients_of(*pair)
    silent = pair[1].manager.on_submit
    pair[1].manager.on_submit = lambda submit: None
    try:
        batch = start_batch(second, [line_of(str(number)) for number in range(5)])
        wait_until(first, batch.id, "in_progress")
        assert first.batches.cancel(batch.id).status == "cancelling"
        assert len(results_of(first, wait_until(first, batch.id, "cancelled").error_file_id)) == 5
    finally:
        pair[1].manager.on_submit = silent


def test_lists_have_the_files_and_batches_of_all_replicas_in_one_order(
    pair: tuple[RunningServer, RunningServer],
) -> None:
    clients = clients_of(*pair, key="lists")
    made = [clients[number % 2].files.create(file=b"%d" % number, purpose="user_data").id for number in range(9)]
    for client in clients:
        for limit in (1, 2, 4, 9, 20):
            listed = list(client.files.list(limit=limit, purpose="user_data"))
            assert sorted(file.id for file in listed) == sorted(made), f"pages of {limit}"
            ages = [file.created_at for file in listed]
            assert ages == sorted(ages, reverse=True)
            upwards = [file.id for file in client.files.list(limit=limit, order="asc", purpose="user_data")]
            assert upwards == [file.id for file in reversed(listed)]
    batches = [start_batch(clients[number % 2], [line_of("a")]).id for number in range(5)]
    for client in clients:
        for limit in (1, 2, 5):
            assert sorted(batch.id for batch in client.batches.list(limit=limit)) == sorted(batches)
    for wrong in ("file-1-" + "0" * 24, "file-0-" + "0" * 24, "file-x"):
        with pytest.raises(openai.NotFoundError) as refusal:
            list(clients[0].files.list(after=wrong))
        assert refusal.value.param == "after"


def test_the_keys_of_one_owner_open_nothing_of_another_through_a_peer(
    pair: tuple[RunningServer, RunningServer],
) -> None:
    (mine,) = clients_of(pair[1], key="mine")
    (other,) = clients_of(pair[0], key="other")
    file = mine.files.create(file=b"x", purpose="user_data")
    for ask in (lambda: other.files.retrieve(file.id), lambda: other.files.delete(file.id)):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert list(other.files.list()) == []


def test_an_owner_that_is_not_there_is_a_503_that_says_when_to_try_again(
    pair: tuple[RunningServer, RunningServer],
) -> None:
    status, headers, body = pair[0].request("GET", f"/v1/batches/{new_batch_id(7)}")
    assert status == 503
    assert headers["retry-after"]
    error = json.loads(body)["error"]
    assert error["code"] == "replica_unavailable"
    assert "ordinal 7" in error["message"]


def test_only_ids_of_ours_are_passed_on_and_never_twice(pair: tuple[RunningServer, RunningServer]) -> None:
    for path in (
        "/v1/files/file-1-..%2f..%2fmetrics",
        "/v1/files/file-1-" + "g" * 24,
        "/v1/files/file-01-" + "0" * 24,
        "/v1/files/file-1-" + "0" * 24 + "%0d%0ax-evil:1",
        "/v1/batches/http:%2f%2fexample.com",
        "/v1/batches/batch_99999-" + "0" * 24,
    ):
        assert pair[0].request("GET", path)[0] == 404, path
    passed = {"x-toka-ordinal": "1"}
    for path in ("/v1/files", "/v1/batches", f"/v1/files/{new_file_id(0)}", f"/v1/batches/{new_batch_id(1)}"):
        status, headers, _ = pair[0].request("GET", path, headers=passed)
        assert (status, headers["x-toka-ordinal"], headers["x-toka-data"]) == (421, "0", "open")


def test_a_client_that_leaves_a_long_answer_of_a_peer_leaves_nothing_open(
    pair: tuple[RunningServer, RunningServer],
) -> None:
    first, second = clients_of(*pair)
    file = second.files.create(file=b"x" * 8_000_000, purpose="user_data")
    connection = http.client.HTTPConnection("127.0.0.1", pair[0].port, timeout=WAIT_S)
    connection.request("GET", f"/v1/files/{file.id}/content", headers={"authorization": "Bearer none"})
    answer = connection.getresponse()
    assert answer.getheader("content-length") == "8000000"
    answer.read(1000)
    connection.close()
    assert len(first.files.content(file.id).content) == 8_000_000


class CutBody(httpx.AsyncByteStream):
    """A body that breaks off, and knows whether it was closed."""

    is_closed = False

    def __init__(self, *parts: bytes) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part
        raise httpx.ReadError("cut")

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("limit", "words"), [(1000, "has stopped answering"), (7, "too many bytes")], ids=["cut", "endless"]
)
def test_an_answer_of_a_peer_that_is_cut_or_does_not_end_is_a_503(
    monkeypatch: pytest.MonkeyPatch, limit: int, words: str
) -> None:
    monkeypatch.setattr(peers, "_MAX_ANSWER_BYTES", limit)
    body = CutBody(b"1234", b"5678")
    with pytest.raises(ApiError, match=words) as refusal:
        asyncio.run(peers.read_whole(httpx.Response(200, stream=body)))
    assert refusal.value.status == 503
    assert body.is_closed


# ---------------------------------------------------------------- replicas that come and go


@pytest.mark.slow
def test_a_successor_asks_its_predecessor_until_that_lets_go_and_has_its_batches_then(
    make: Callable[[int], Deployment],
) -> None:
    deployment = make(1)
    old = deployment.start(0)
    wait_own(old)
    (client,) = clients_of(old)
    batch = wait_until(client, start_batch(client, [line_of("a")]).id, "completed")
    new = deployment.start(0, deployment.ports[1])
    status, answer = new.post("/v1/completions", {"model": "smollm2", "prompt": "The capital", "max_tokens": 2})
    assert status == 200, answer
    (later,) = clients_of(new)
    assert later.batches.retrieve(batch.id) == batch
    assert [found.id for found in later.batches.list()] == [batch.id]
    old.drain()
    old.wait_control(Drained)
    old.stop()
    wait_own(new)
    assert later.batches.retrieve(batch.id) == batch
    assert set(results_of(later, batch.output_file_id)) == {"a"}


def test_a_list_without_a_replica_that_should_be_there_is_refused(make: Callable[[int], Deployment]) -> None:
    deployment = make(2)
    deployment.forget(deployment.ports[2])
    first = deployment.start(0)
    status, headers, body = first.request("GET", "/v1/files")
    assert status == 503
    assert headers["retry-after"]
    assert "not whole" in json.loads(body)["error"]["message"]


@pytest.mark.slow
def test_a_pod_that_never_starts_takes_nothing_from_lists_and_one_that_had_files_does(
    make: Callable[[int], Deployment],
) -> None:
    deployment = make(2)
    first, second = deployment.start(0), deployment.start(1)
    broken = deployment.start(1, deployment.ports[2])
    for server in (first, second):
        wait_own(server)
    (client,) = clients_of(first)
    assert list(client.files.list()) == []
    broken.stop()
    until = time.monotonic() + 2 * FIND_AGAIN_S
    while time.monotonic() < until:
        assert list(client.files.list()) == []
    second.stop()
    deadline = time.monotonic() + WAIT_S
    while first.request("GET", "/v1/files")[0] != 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # peers are looked for once a second


def test_many_polls_of_a_dead_owner_are_answered_in_time(make: Callable[[int], Deployment]) -> None:
    deployment = make(2)
    deployment.forget(deployment.ports[2])
    first, second = deployment.start(0), deployment.start(1)
    for server in (first, second):
        wait_own(server)
    (client,) = clients_of(second)
    file = client.files.create(file=b"x", purpose="user_data")
    assert clients_of(first)[0].files.retrieve(file.id) == file
    second.process.kill()
    second.process.wait()
    found: list[int] = []

    def ask() -> None:
        found.append(first.request("GET", f"/v1/files/{file.id}", headers={"authorization": "Bearer none"})[0])

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == [503] * 50


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("ordinal", "names"),
    [
        ("", "chat-peers"),
        ("x", "chat-peers"),
        ("-1", "a"),
        ("10000", "a"),
        ("0", "http://a"),
        ("0", "a,,b"),
        ("0", "a b"),
    ],
)
def test_faulty_names_and_ordinals_end_the_start(ordinal: str, names: str) -> None:
    with pytest.raises(ConfigError, match="TOKA_"):
        Peers.read({"TOKA_ORDINAL": ordinal, "TOKA_PEERS": names}, 10210)


def test_without_names_there_are_no_peers() -> None:
    assert Peers.read({"TOKA_ORDINAL": "0"}, 1) is None


def test_ids_tell_their_owner_and_no_other_text_does() -> None:
    assert ordinal_of(new_file_id(0)) == 0
    assert ordinal_of(new_batch_id(999)) == 999
    for text in (new_file_id(), new_batch_id(), "", "file-1-", f"x{new_file_id(1)}", f"{new_file_id(1)}\n"):
        assert ordinal_of(text) is None


def test_a_cursor_parts_what_is_of_the_same_second_by_ordinal() -> None:
    cursor = Cursor(100, 2)
    assert cursor.bound_for(1, is_ascending=False) == ("<=", 100)
    assert cursor.bound_for(3, is_ascending=False) == ("<", 100)
    assert cursor.bound_for(1, is_ascending=True) == (">", 100)
    assert cursor.bound_for(3, is_ascending=True) == (">=", 100)
