"""The status page: its HTML as a browser parses it, its headers, and to whom it shows what."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import openai
import pytest
from toka_engine.control_messages import Progress
from toka_engine.messages import Stats
from toka_engine.server.batches.database import Database, DatabaseThread
from toka_engine.server.replicas import Replicas
from toka_engine.server.status_page.content import format_age, list_batches
from toka_engine.server.status_page.plots import WIDTH, draw, format_number, round_up
from toka_engine.server.status_page.samples import NUM_SAMPLES, SAMPLE_S, LoadSamples, Series

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import completion_body
from tests.unit.server.harness import MODEL, RunningServer, running_server, speak, wait_until

_VOID = {"meta", "link", "input", "br", "line", "polygon", "polyline"}
_EVIL = "</script><script>alert(1)</script>\"'&<b onload=x>"


class Page(HTMLParser):
    """A page's elements and texts; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def by_id(self, wanted: str) -> dict[str, str | None]:
        (found,) = [attributes for _, attributes in self.elements if attributes.get("id") == wanted]
        return found


def _get(server: RunningServer, path: str = "/", key: str | None = None) -> tuple[int, dict[str, str], Page]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    status, sent, body = server.request("GET", path, None, headers)
    return status, sent, Page(body.decode())


def _stats(**values: Any) -> Stats:
    return Stats(**({field.name: 0 for field in msgspec.structs.fields(Stats) if field.required} | values))


# ---------------------------------------------------------------- page and headers


def test_the_page_names_the_model_its_version_and_its_state(server: RunningServer) -> None:
    status, headers, page = _get(server)
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    version = json.loads(server.request("GET", "/version")[2])["version"]
    for words in (MODEL, "Ready", f"toka {version}", "Load now", "Last ten minutes", "Playground", "2,048 tokens"):
        assert words in page.text
    assert page.by_id("name") == {"id": "name"}
    assert [option["value"] for option in page.all("option")] == [MODEL]


def test_the_policy_allows_what_the_page_has_and_nothing_else(server: RunningServer) -> None:
    _, headers, page = _get(server)
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    (style,), (script,) = page.all("style"), page.all("script")
    assert policy["script-src"] == f"'nonce-{script['nonce']}'"
    assert policy["style-src"] == f"'nonce-{style['nonce']}'"
    assert script.keys() == {"nonce"}
    assert [policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")] == ["'none'"] * 4
    assert policy["connect-src"] == "'self'"
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "action")]
        assert ":" not in (attributes.get("href") or "") or attributes["href"] == "data:,"
    _, other, _ = _get(server)
    assert other["content-security-policy"] != headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/", "/status"])
def test_the_page_is_neither_framed_nor_cached(server: RunningServer, path: str) -> None:
    _, headers, _ = _get(server, path)
    assert headers["cache-control"] == "no-store"
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    status, sent, nothing = server.request("HEAD", path)
    assert (status, nothing, sent["content-type"]) == (200, b"", headers["content-type"])
    assert server.request("POST", path, b"{}")[0] == 405


def test_every_control_has_a_name_and_every_plot_words(server: RunningServer) -> None:
    server.request("GET", "/")
    _, _, page = _get(server)
    assert page.all("html") == [{"lang": "en"}]
    assert [svg["role"] for svg in page.all("svg")] == ["img"] * 5
    assert all("ten minutes" in svg["aria-label"] or "nothing" in svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("label")) == len([*page.all("input"), *page.all("select"), *page.all("textarea")])
    labelled = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labelled <= {attributes.get("id") for _, attributes in page.elements}


def test_status_page_f_leaves_it_out(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, status_page=False) as server:
        for path in ("/", "/status"):
            status, headers, answer = server.request("GET", path)
            assert (status, headers["content-type"]) == (404, "application/json")
            assert json.loads(answer)["error"]["code"] == "not_found"


def test_the_page_says_what_a_start_waits_for(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, sends_info=False) as server:
        while server.wait_control(Progress).phase != "wait":
            pass
        status, _, page = _get(server)
        assert (status, page.by_id("state")["class"]) == (200, "pill wait")
        assert "Starting" in page.text
        assert "waiting for the model" in page.text


def test_a_name_of_markup_is_text(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, served_model_name=_EVIL) as server:
        for path in ("/", "/status"):
            _, _, page = _get(server, path)
            assert json.loads(page.by_id("content")["data-models"] or "") == [_EVIL]
            assert page.all("b") == []
            assert len(page.all("script")) == (path == "/")
        assert _EVIL in _get(server)[2].text


def test_refreshes_leave_no_lines_in_the_log(tokenizer_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file, running_server(tokenizer_dir, stderr=file) as server:
        server.request("GET", "/status")
        server.request("GET", "/", None, {"x-request-id": "last"})
        wait_until(lambda: "request_id=last " in log.read_text())
        assert "path='/status'" not in log.read_text()


# ---------------------------------------------------------------- load


def test_the_load_is_that_of_the_managers_last_report(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir) as server:
        report = _stats(running=28, waiting=12345, kv_pages_used=3, kv_pages_total=4, output_tokens_total=1_200_000)
        server.manager.send(report)
        wait_until(lambda: "12,345" in _get(server, "/status")[2].text)
        text = _get(server, "/status")[2].text
        assert "Running28" in text
        assert "KV cache in use75 %" in text
        assert "1.2 M" in text


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_samples_are_a_ring_of_ten_minutes() -> None:
    clock = _Clock()
    replicas = Replicas([lambda message: None] * 2, 16)
    samples = LoadSamples(replicas, clock)
    samples.take()
    assert samples.level(lambda one: one.running).values == [0]
    for number in range(1000):
        clock.now += SAMPLE_S
        for replica in replicas.all:
            replica.stats = _stats(running=number, output_tokens_total=100 * number)
        samples.take()
    assert len(samples) == NUM_SAMPLES
    running, speed = samples.level(lambda one: one.running), samples.rate(lambda one: one.output_tokens)
    assert (running.ages_s[0], running.ages_s[-1], running.latest) == (600.0, 0.0, 2 * 999)
    assert set(speed.values) == {2 * 100 / SAMPLE_S}
    replicas.all[0].is_lost = True
    samples.take()
    assert samples.level(lambda one: one.running).latest == 999
    assert samples.rate(lambda one: one.output_tokens).latest == 0  # a total holds those of a lost replica


def test_a_plot_has_its_values_from_left_to_right_and_in_words() -> None:
    plot = draw("Tokens", Series([600.0, 300.0, 0.0], [0.0, 10.0, 5.0]), "/s")
    assert plot.line == f"0.0,96.0 {WIDTH / 2},0.0 {WIDTH}.0,48.0"
    assert (plot.shown, plot.top) == ("5/s", "10/s")
    assert plot.description == "Tokens: 5/s now, 5/s on average and at most 10/s in the last ten minutes."
    assert draw("Tokens", Series([], []), "/s").line == ""
    share = draw("Cache", Series([0.0], [0.5]), " %", is_share=True)
    assert (share.shown, share.top) == ("50 %", "100 %")


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (1, 1), (1.5, 2), (3, 5), (5, 5), (7, 10), (1271, 2000), (1e6, 1e6)]
)
def test_a_plots_upper_edge_is_a_round_number(value: float, top: float) -> None:
    assert round_up(value) == top


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.44, "0.4"), (9.96, "10"), (12, "12"), (999_499, "999,499"), (999_500, "1.0 M"), (2_400_000, "2.4 M")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_ages_are_in_their_largest_unit() -> None:
    assert [format_age(seconds) for seconds in (5, 90, 7300, 200_000)] == [
        "just now",
        "2 min ago",
        "2 h ago",
        "2 d ago",
    ]


# ---------------------------------------------------------------- keys and batches


def _client(server: RunningServer, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


def _batch(server: RunningServer, key: str, body: dict[str, Any]) -> str:
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}).encode()
    client = _client(server, key)
    file = client.files.create(file=("f.jsonl", line), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"))
    return batch.id


def test_with_keys_the_page_shows_no_more_than_the_probes_without_one(
    tokenizer_dir: Path, tmp_path: Path, sentence_ids: list[int]
) -> None:
    keys = tmp_path / "keys"
    both = [{"name": "alice", "key": "sk-a", "max_requests": 7}, {"name": "bob", "key": "sk-b"}]
    keys.write_text(json.dumps({"keys": both}))
    data = tmp_path / "data"
    settings: dict[str, Any] = {"api_keys_file": str(keys), "data_dir": str(data), "served_model_name": MODEL}
    with running_server(tokenizer_dir, answer=lambda m, submit: speak(m, submit, sentence_ids), **settings) as server:
        alice = {"authorization": "Bearer sk-a"}
        wait_until(lambda: server.request("GET", "/v1/files", None, alice)[0] == 200)
        done, failed = (
            _batch(server, "sk-a", completion_body()),
            _batch(server, "sk-a", {"model": _EVIL, "stream": True}),
        )
        status, _, page = _get(server)
        assert (status, page.by_id("name")) == (200, {"id": "name"})
        assert "Ready" in page.text
        assert "This engine asks for a key" in page.text
        for hidden in (MODEL, done, "Load now", "alice"):
            assert hidden not in server.request("GET", "/")[2].decode()
        assert server.request("GET", "/status")[0] == 401
        assert server.request("GET", "/status", None, {"authorization": "Bearer x"})[0] == 401
        _, _, mine = _get(server, "/status", "sk-a")
        for words in (done, failed, "completed", "failed", "1 of 1", "alice", "0 of 7 at once"):
            assert words in mine.text
        (progress,) = mine.all("progress")
        assert (progress["max"], progress["value"]) == ("1", "1")
        assert mine.all("script") == []
        _, _, others = _get(server, "/status", "sk-b")
        assert "There is none." in others.text
        for hidden in (done, failed, "alice"):
            assert hidden not in others.text


async def test_a_database_that_fails_leaves_the_rest_of_the_page(tmp_path: Path) -> None:
    database = await DatabaseThread.open(tmp_path / "toka.db")
    await database.run(Database.close)
    opened = SimpleNamespace(database=database)
    batches: Any = SimpleNamespace(config=SimpleNamespace(data_dir="x"), opened=lambda: opened)
    rows, reason = await list_batches(batches, "")
    assert (rows, "cannot be read" in reason) == ([], True)


def test_without_a_data_dir_the_page_says_so(server: RunningServer) -> None:
    assert "its key data_dir is not set" in _get(server)[2].text
