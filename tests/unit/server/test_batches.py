"""Files and batches through the openai client and plain HTTP: a real server process, a scripted manager."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from toka_engine.messages import Refused, Submit
from toka_engine.server.batches.database import Database
from toka_engine.server.keys.check import owner_by_digest

from tests.engine_process import WAIT_S
from tests.unit.server.harness import MODEL, Answer, RunningServer, ScriptedManager, running_server, speak

COMPLETIONS = "/v1/completions"


def line_of(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    wanted = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": wanted}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def client_of(server: RunningServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


def wait_until(client: openai.OpenAI, batch_id: str, *states: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in states:
            return batch
        time.sleep(0.05)  # a client's polling: nothing tells it
    raise AssertionError(f"{batch_id} is {batch.status}, not {states}")


def start_batch(client: openai.OpenAI, lines: list[dict[str, Any]], **more: Any) -> Any:
    file = client.files.create(file=("requests.jsonl", jsonl(lines)), purpose="batch")
    wanted: dict[str, Any] = {"endpoint": COMPLETIONS, "completion_window": "24h", **more}
    return client.batches.create(input_file_id=file.id, **wanted)


def results_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """Return the lines of a result file by custom_id; none is there twice."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).content.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "a line of input has two lines of output"
    return found


@pytest.fixture
def start(tokenizer_dir: Path, tmp_path: Path, sentence_ids: list[int]) -> Iterator[Callable[..., RunningServer]]:
    """Start a server whose files are in one folder for all of the test's servers."""
    running: list[RunningServer] = []

    def begin(*, speaks: bool = True, answer: Answer | None = None, **settings: Any) -> RunningServer:
        if speaks and answer is None:
            answer = partial(speak, ids=sentence_ids)
        server = RunningServer(tokenizer_dir, answer=answer, **{"data_dir": str(tmp_path / "data"), **settings})
        running.append(server)
        wait_open(server)
        return server

    yield begin
    for server in running:
        server.stop()


def wait_open(server: RunningServer) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if server.request("GET", "/v1/files")[0] != 503:
            return
        time.sleep(0.02)  # the folder opens beside the start
    raise AssertionError("the folder did not open")


def wait_draining(server: RunningServer) -> None:
    deadline = time.monotonic() + WAIT_S
    while server.request("GET", "/readyz")[0] == 200:
        assert time.monotonic() < deadline, "the server did not begin to drain"
        time.sleep(0.02)  # nothing else tells it


@pytest.fixture(scope="module")
def shared(
    tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory, sentence_ids: list[int]
) -> Iterator[RunningServer]:
    """One server for the tests that leave nothing behind but files."""
    folder = tmp_path_factory.mktemp("batches")
    settings: dict[str, Any] = {"data_dir": str(folder), "max_batch_lines": 400, "receive_timeout_s": 1.0}
    with running_server(tokenizer_dir, answer=partial(speak, ids=sentence_ids), **settings) as server:
        server.data_dir = folder  # type: ignore[attr-defined]
        wait_open(server)
        yield server


# ---------------------------------------------------------------- what works


def test_a_batch_answers_each_line_once_in_the_clients_own_shape(shared: RunningServer) -> None:
    client = client_of(shared)
    lines = [line_of(f"line-{number}") for number in range(300)]
    lines.append(line_of("wrong", temperature=-1))
    batch = start_batch(client, lines, metadata={"run": "7"})
    assert batch.status in ("validating", "in_progress")
    batch = wait_until(client, batch.id, "completed")
    good, bad = results_of(client, batch.output_file_id), results_of(client, batch.error_file_id)
    assert set(good) == {line["custom_id"] for line in lines} - {"wrong"}
    answer = good["line-7"]
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["choices"][0]["text"]
    assert set(bad) == {"wrong"}
    assert bad["wrong"]["response"]["status_code"] == 400
    assert bad["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (301, 300, 1)
    assert batch.usage.output_tokens == 4 * 300
    assert {submit.priority for submit in shared.manager.submits} == {100}, "lines come behind other requests"
    assert batch.metadata == {"run": "7"}
    assert batch.model == MODEL


def test_chat_lines_run_as_the_chat_endpoint_does(shared: RunningServer) -> None:
    client = client_of(shared)
    url = "/v1/chat/completions"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "n": 2}
    lines = [{"custom_id": "a", "method": "POST", "url": url, "body": body}]
    batch = wait_until(client, start_batch(client, lines, endpoint=url).id, "completed")
    choices = results_of(client, batch.output_file_id)["a"]["response"]["body"]["choices"]
    assert [choice["message"]["role"] for choice in choices] == ["assistant", "assistant"]


def test_files_are_listed_by_page_read_and_deleted(shared: RunningServer) -> None:
    client = client_of(shared)
    files = [client.files.create(file=(f"{n}.jsonl", b"%d\n" % n), purpose="user_data") for n in range(5)]
    newest = [file.id for file in client.files.list(limit=2, purpose="user_data")]
    assert newest[:5] == [file.id for file in reversed(files)]
    oldest = [file.id for file in client.files.list(limit=2, order="asc", purpose="user_data")]
    assert oldest[-5:] == [file.id for file in files]
    assert client.files.retrieve(files[3].id).filename == "3.jsonl"
    assert client.files.content(files[3].id).content == b"3\n"
    assert client.files.delete(files[3].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[3].id)
    assert not {file.id for file in client.files.list(purpose="batch")} & set(newest)


def test_a_large_upload_comes_back_as_it_was(shared: RunningServer) -> None:
    client = client_of(shared)
    data = bytes(range(256)) * 40_000
    file = client.files.create(file=("../../etc/pass\r\nwd", data), purpose="user_data")
    assert "/" not in file.filename
    assert file.bytes == len(data)
    answer = client.files.content(file.id)
    assert answer.content == data
    assert "attachment" in answer.response.headers["content-disposition"]


def test_an_upload_may_take_longer_than_a_request_while_it_makes_progress(shared: RunningServer) -> None:
    head, tail = (
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="slow"\r\n\r\n',
        b"\r\n--b--\r\n",
    )
    piece, pieces = b"x" * 70_000, 4
    size = len(head) + len(tail) + len(piece) * pieces
    with shared.connect() as sock:
        sock.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n"
            b"content-type: multipart/form-data; boundary=b\r\n\r\n" % size + head
        )
        for _ in range(pieces):
            threading.Event().wait(0.6)  # the client is slow, and that is the test
            sock.sendall(piece)
        sock.sendall(tail)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["bytes"] == len(piece) * pieces


# ---------------------------------------------------------------- what is refused


def test_without_a_folder_the_answer_names_the_key(server: RunningServer) -> None:
    for method, path in (
        *(("GET", path) for path in ("/v1/files", "/v1/files/file-1", "/v1/files/file-1/content", "/v1/batches")),
        *(("POST", path) for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1/cancel")),
        ("GET", "/v1/batches/batch_1"),
        ("DELETE", "/v1/files/file-1"),
    ):
        status, _, body = server.request(method, path, b"{}" if method == "POST" else None)
        assert status == 501, (method, path)
        assert "data_dir" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("lines", "code", "number", "word"),
    [
        ([line_of("a"), line_of("a")], "duplicate_custom_id", 2, "'a'"),
        ([line_of("a"), line_of("b", url="/v1/models")], "mismatched_url", 2, "/v1/models"),
        ([line_of("a", stream=True)], "stream_not_supported", 1, "streamed"),
        ([{**line_of("a"), "method": "GET"}], "invalid_json_line", 1, "method"),
        ([{**line_of("a"), "extra": 1}], "invalid_json_line", 1, "extra"),
        ([line_of("")], "invalid_custom_id", 1, "custom_id"),
        ([], "empty_file", None, "no line"),
        ([line_of(str(number)) for number in range(401)], "too_many_lines", None, "400 lines"),
    ],
)
def test_a_faulty_line_fails_the_batch_with_its_number(
    shared: RunningServer, lines: list[dict[str, Any]], code: str, number: int | None, word: str
) -> None:
    client = client_of(shared)
    batch = wait_until(client, start_batch(client, lines).id, "failed")
    (error,) = batch.errors.data
    assert (error.code, error.line) == (code, number)
    assert word in error.message


def test_what_is_wrong_with_a_batch_or_upload_is_named(start: Callable[..., RunningServer]) -> None:
    server = start(max_file_bytes=1000, max_stored_bytes=1500)
    client = client_of(server)
    with pytest.raises(openai.BadRequestError) as purpose:
        client.files.create(file=b"x", purpose="fine-tune")
    assert purpose.value.param == "purpose"
    with pytest.raises(openai.APIStatusError) as large:
        client.files.create(file=b"x" * 1001, purpose="batch")
    assert large.value.status_code == 413
    file = client.files.create(file=b"x" * 900, purpose="user_data")
    with pytest.raises(openai.InternalServerError) as share:
        client.files.create(file=b"x" * 900, purpose="batch")
    assert share.value.status_code == 507
    assert len(list(client.files.list())) == 1
    for wanted, param in (
        ({"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}, "input_file_id"),
        ({"input_file_id": "file-0", "endpoint": COMPLETIONS, "completion_window": "24h"}, "input_file_id"),
        ({"input_file_id": file.id, "endpoint": "/v1/models", "completion_window": "24h"}, "endpoint"),
        ({"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "1d"}, "completion_window"),
        ({"input_file_id": file.id, "endpoint": COMPLETIONS, "no_such_field": 1}, "no_such_field"),
    ):
        status, body = server.post("/v1/batches", wanted)
        assert status in (400, 404)
        assert body["error"]["param"] == param
    for query, param in (("limit=0", "limit"), ("order=up", "order"), ("after=file-9", "after"), ("page=2", "page")):
        status, _, raw = server.request("GET", f"/v1/files?{query}")
        assert status in (400, 404)
        assert json.loads(raw)["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"--b\r\n", "multipart/form-data; boundary=b"),
        (b"nonsense", "multipart/form-data; boundary=b"),
        (b"--b\r\ncontent-disposition: form-data; name=x\r\n\r\n1\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"--b\r\nx: " + b"y" * 1_000_000, "multipart/form-data; boundary=b"),
        (b"--b\r\n" + b"x: y\r\n" * 100_000, "multipart/form-data; boundary=b"),
        (
            b"--b\r\ncontent-disposition: form-data; name=file; filename=a\r\n\r\n1\r\n" * 2,
            "multipart/form-data; boundary=b",
        ),
        (
            b"--b\r\ncontent-disposition: form-data; name=purpose\r\n\r\n" + b"x" * 300,
            "multipart/form-data; boundary=b",
        ),
    ],
)
def test_a_broken_upload_is_a_4xx_and_leaves_nothing(shared: RunningServer, body: bytes, kind: str) -> None:
    folder: Path = shared.data_dir / "files"  # type: ignore[attr-defined]
    before = set(folder.iterdir())
    status, _, answer = shared.request("POST", "/v1/files", body, {"content-type": kind})
    assert status in (400, 415), answer
    assert set(folder.iterdir()) == before


def test_one_keys_files_and_batches_are_unknown_to_another(shared: RunningServer) -> None:
    assert owner_by_digest([(b"authorization", b"Bearer one")]) != owner_by_digest([(b"authorization", b"Bearer two")])
    mine, other = client_of(shared, "one"), client_of(shared, "two")
    batch = wait_until(mine, start_batch(mine, [line_of("a")]).id, "completed")
    assert list(other.files.list()) == []
    assert list(other.batches.list()) == []
    for ask in (
        lambda: other.files.content(batch.output_file_id),
        lambda: other.files.delete(batch.input_file_id),
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: start_batch_of(other, batch.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()


def start_batch_of(client: openai.OpenAI, file_id: str) -> Any:
    return client.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")


# ---------------------------------------------------------------- ends before the end


def test_a_cancelled_batch_keeps_what_is_answered_and_names_the_rest(
    start: Callable[..., RunningServer], sentence_ids: list[int]
) -> None:
    def answer_even(manager: ScriptedManager, submit: Submit) -> None:
        if submit.first_stream % 2 == 0:
            speak(manager, submit, sentence_ids)

    server = start(answer=answer_even)
    client = client_of(server)
    batch = start_batch(client, [line_of(str(number)) for number in range(40)])
    server.manager.wait_for(lambda: len(server.manager.submits) == 40)
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    deadline = time.monotonic() + WAIT_S
    while client.batches.retrieve(batch.id).request_counts.completed < 20:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a client's polling
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait_until(client, batch.id, "cancelled")
    server.manager.wait_for(lambda: len(server.manager.cancelled) == 20)
    good, bad = results_of(client, batch.output_file_id), results_of(client, batch.error_file_id)
    assert len(good) == len(bad) == 20
    assert not set(good) & set(bad)
    assert {line["error"]["code"] for line in bad.values()} == {"batch_cancelled"}
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_a_full_queue_is_waited_out(start: Callable[..., RunningServer], sentence_ids: list[int]) -> None:

    refused: set[int] = set()

    def refuse_first(manager: ScriptedManager, submit: Submit) -> None:
        if len(refused) < 5:
            refused.add(submit.first_stream)
            manager.send(Refused(submit.first_stream, "full"))
        else:
            speak(manager, submit, sentence_ids)

    server = start(answer=refuse_first)
    client = client_of(server)
    batch = start_batch(client, [line_of(str(number)) for number in range(10)])
    batch = wait_until(client, batch.id, "completed")
    assert len(results_of(client, batch.output_file_id)) == 10
    assert batch.error_file_id is None


def test_a_line_of_a_batch_whose_time_is_over_has_its_504(
    start: Callable[..., RunningServer], sentence_ids: list[int]
) -> None:
    """The time counts from the first attempt: refusals are tried again until it is over."""

    def answer(manager: ScriptedManager, submit: Submit) -> None:
        if not submit.timeout_s:
            speak(manager, submit, sentence_ids)
        else:
            manager.send(Refused(submit.first_stream, "late", "deadline_unreachable", 9))

    client = client_of(server := start(answer=answer))
    batch = start_batch(client, [line_of("late", timeout_s=0.6), line_of("plain")])
    batch = wait_until(client, batch.id, "completed")
    assert results_of(client, batch.output_file_id).keys() == {"plain"}
    late = results_of(client, batch.error_file_id)["late"]
    assert late["response"]["status_code"] == 504
    assert late["response"]["body"]["error"]["code"] == "deadline_exceeded"
    assert len([submit for submit in server.manager.submits if submit.timeout_s]) >= 2


def test_a_drain_finishes_lines_in_flight_and_the_next_start_does_the_rest(
    start: Callable[..., RunningServer], sentence_ids: list[int]
) -> None:
    first = start(speaks=False, drain_endpoint_delay_s=0.0)
    info_window = 2 * 256
    client = client_of(first)
    batch = start_batch(client, [line_of(str(number)) for number in range(info_window + 100)])
    first.manager.wait_for(lambda: len(first.manager.submits) == info_window)
    first.drain()
    wait_draining(first)  # else answers may make room for lines before the server knows of the drain
    for submit in list(first.manager.submits):
        speak(first.manager, submit, sentence_ids)
    first.process.wait(WAIT_S)
    assert len(first.manager.submits) == info_window, "a line began after the drain"
    second = start()
    batch = wait_until(client_of(second), batch.id, "completed")
    assert len(results_of(client_of(second), batch.output_file_id)) == info_window + 100
    assert len(second.manager.submits) == 100


@pytest.mark.slow
def test_lines_are_neither_lost_nor_repeated_however_often_the_server_is_killed(
    start: Callable[..., RunningServer], sentence_ids: list[int]
) -> None:
    num_lines, batch_id = 1500, ""
    for turn in range(4):
        is_time = threading.Event()

        def answer(manager: ScriptedManager, submit: Submit, is_time: threading.Event = is_time) -> None:
            if len(manager.submits) <= 330:  # some of these are on the disk by the kill, some are not
                speak(manager, submit, sentence_ids)
            if len(manager.submits) == 330:
                is_time.set()

        server = start(answer=answer)
        if turn == 0:
            batch_id = start_batch(client_of(server), [line_of(str(number)) for number in range(num_lines)]).id
        assert is_time.wait(WAIT_S)
        server.process.kill()
        server.process.wait()
    client = client_of(start())
    batch = wait_until(client, batch_id, "completed")
    assert set(results_of(client, batch.output_file_id)) == {str(number) for number in range(num_lines)}
    assert batch.request_counts.completed == num_lines


@pytest.mark.slow
def test_a_batch_that_was_checked_goes_on_with_a_lower_limit_of_bodies(start: Callable[..., RunningServer]) -> None:
    first = start(speaks=False)
    batch = start_batch(client_of(first), [line_of(str(number), user="x" * 2000) for number in range(3)])
    first.manager.wait_for(lambda: len(first.manager.submits) == 3)
    first.process.kill()
    first.process.wait()
    client = client_of(start(max_body_bytes=1000))
    batch = wait_until(client, batch.id, "completed")
    assert results_of(client, batch.output_file_id).keys() == {"0", "1", "2"}


@pytest.mark.slow
def test_a_damaged_database_is_told_and_completions_go_on(
    start: Callable[..., RunningServer], tmp_path: Path, tokenizer_dir: Path, sentence_ids: list[int]
) -> None:
    first = start()
    client_of(first).files.create(file=b"x", purpose="user_data")
    first.process.kill()
    first.process.wait()
    for name in ("toka.db-wal", "toka.db-shm"):
        (tmp_path / "data" / name).unlink(missing_ok=True)
    (tmp_path / "data/toka.db").write_bytes(b"no database" * 1000)
    answer = partial(speak, ids=sentence_ids)
    with running_server(tokenizer_dir, answer=answer, data_dir=str(tmp_path / "data")) as second:
        status, _, body = second.request("GET", "/v1/files")
        assert status == 503
        assert second.post(COMPLETIONS, {"model": MODEL, "prompt": "x", "max_tokens": 2})[0] == 200
        deadline = time.monotonic() + WAIT_S
        while "cannot be used" not in json.loads(body)["error"]["message"]:
            assert time.monotonic() < deadline
            _, _, body = second.request("GET", "/v1/files")


@pytest.mark.slow
def test_a_second_engine_waits_for_the_folder_and_then_takes_it(
    start: Callable[..., RunningServer], tmp_path: Path, tokenizer_dir: Path
) -> None:
    first = start()
    file = client_of(first).files.create(file=b"x", purpose="user_data")
    with running_server(tokenizer_dir, data_dir=str(tmp_path / "data")) as second:
        deadline = time.monotonic() + WAIT_S
        while b"Another engine" not in (answer := second.request("GET", "/v1/files"))[2]:
            assert time.monotonic() < deadline, answer
        first.process.kill()
        first.process.wait()
        wait_open(second)
        assert client_of(second).files.content(file.id).content == b"x"


def test_the_same_answer_comes_for_a_line_as_for_a_request(shared: RunningServer) -> None:
    client = client_of(shared)
    batch = wait_until(client, start_batch(client, [line_of("a", logprobs=1)]).id, "completed", "failed")
    shown = results_of(client, batch.output_file_id) | results_of(client, batch.error_file_id)
    status, direct = shared.post(COMPLETIONS, line_of("a", logprobs=1)["body"])
    answer = shown["a"]["response"]
    assert answer["status_code"] == status
    for varying in ("id", "created"):
        direct.pop(varying, None)
        answer["body"].pop(varying, None)
    assert answer["body"] == direct


# ---------------------------------------------------------------- the original's endpoint


def test_many_completions_are_answered_in_the_order_of_their_requests(server: RunningServer) -> None:
    body = {"requests": [line_of("")["body"], {"prompt": "no model"}, line_of("", n=2)["body"]]}
    status, answers = server.post("/custom/synchronous-batch-completions", body)
    assert status == 200
    assert [len(answer.get("choices", [])) for answer in answers] == [1, 0, 2]
    assert answers[1]["error"]["param"] == "model"
    for wrong in ({"requests": []}, {"requests": [{}] * 1025}, {"requests": 1}, {}):
        status, refusal = server.post("/custom/synchronous-batch-completions", wrong)
        assert (status, refusal["error"]["param"]) == (400, "requests")


# ---------------------------------------------------------------- time


def edit_database(folder: Path, change: Callable[[Database], None]) -> None:
    """Change what a stopped server has stored: times of hours have passed."""
    database = Database(folder / "toka.db")
    change(database)
    database.close()


@pytest.mark.slow
def test_a_batch_whose_window_ends_keeps_its_answers_and_names_the_rest(
    start: Callable[..., RunningServer], tmp_path: Path, sentence_ids: list[int]
) -> None:
    first = start(
        answer=lambda manager, submit: speak(manager, submit, sentence_ids) if submit.first_stream < 5 else None
    )
    batch = start_batch(client_of(first), [line_of(str(number)) for number in range(20)])
    deadline = time.monotonic() + WAIT_S
    while client_of(first).batches.retrieve(batch.id).request_counts.completed < 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a client's polling
    first.process.kill()
    first.process.wait()

    def let_a_day_pass(database: Database) -> None:
        (stored,) = database.list_unfinished()
        past = msgspec.structs.replace(stored.batch, expires_at=stored.batch.created_at)
        database.update_batch(msgspec.structs.replace(stored, batch=past))

    edit_database(tmp_path / "data", let_a_day_pass)
    client = client_of(start(speaks=False))
    batch = wait_until(client, batch.id, "expired")
    good, bad = results_of(client, batch.output_file_id), results_of(client, batch.error_file_id)
    assert (len(good), len(bad)) == (5, 15)
    assert set(good) | set(bad) == {str(number) for number in range(20)}
    assert {line["error"]["code"] for line in bad.values()} == {"batch_expired"}


@pytest.mark.slow
def test_a_file_whose_time_is_over_is_removed(start: Callable[..., RunningServer], tmp_path: Path) -> None:
    first = start()
    kept, gone = (client_of(first).files.create(file=b"x", purpose="user_data") for _ in range(2))
    first.process.kill()
    first.process.wait()

    def let_a_month_pass(database: Database) -> None:
        file = database.find_file(owner_by_digest([(b"authorization", b"Bearer none")]), gone.id)
        assert file is not None
        database.remove_file(gone.id)
        database.add_file(
            owner_by_digest([(b"authorization", b"Bearer none")]), msgspec.structs.replace(file, expires_at=1)
        )

    edit_database(tmp_path / "data", let_a_month_pass)
    client = client_of(start())
    deadline = time.monotonic() + WAIT_S
    while (tmp_path / "data/files" / gone.id).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # the sweep runs beside
    assert [file.id for file in client.files.list()] == [kept.id]


def test_a_key_is_the_same_owner_in_either_header() -> None:
    assert (
        owner_by_digest([(b"x-api-key", b"one")])
        == owner_by_digest([(b"authorization", b"Bearer one")])
        != owner_by_digest([])
    )
