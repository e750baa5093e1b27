"""The status page in headless Chromium: what a reader sees and does. TOKA_SCREENSHOTS=FOLDER keeps pictures of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from toka_engine.messages import Stats, Submit

from tests.browser.chromium import Chromium, Tab, chromium
from tests.unit.server.conftest import SENTENCE
from tests.unit.server.harness import MODEL, RunningServer, each, running_server, speak, streams_of

_ENTER, _TAB = ("Enter", 13), ("Tab", 9)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def tab(browser: Chromium) -> Tab:
    return browser.new_tab()


@pytest.fixture(scope="module")
def server(tokenizer_dir: Path, sentence_ids: list[int]) -> Iterator[RunningServer]:
    with running_server(tokenizer_dir) as started:
        started.manager.on_submit = lambda submit: speak(started.manager, submit, sentence_ids)
        yield started


def _photograph(tab: Tab, name: str) -> None:
    if folder := os.environ.get("TOKA_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tab.photograph(Path(folder) / f"{name}.png")


def _ask(tab: Tab, text: str) -> None:
    tab.value_of("document.getElementById('prompt').focus()")
    tab.type(text)
    tab.press(*_ENTER)


_IS_DONE = "document.querySelector('.turn.assistant:last-child .cost').textContent"


def test_a_chat_streams_into_the_page(tab: Tab, server: RunningServer) -> None:
    tab.open(server.url + "/")
    _ask(tab, "What is the <b>capital</b>?")
    tab.wait_for(_IS_DONE)
    shown = tab.value_of("[...document.querySelectorAll('.turn')].map(turn => turn.firstChild.nextSibling.textContent)")
    assert shown == ["What is the <b>capital</b>?", SENTENCE]
    assert "tokens/s" in tab.value_of(_IS_DONE)
    assert tab.value_of("document.querySelectorAll('#talk b').length") == 0
    _ask(tab, "And then?")
    tab.wait_for("document.querySelectorAll('.turn.assistant .cost:not(:empty)').length === 2")
    assert tab.value_of("document.getElementById('prompt').value") == ""
    assert tab.complaints == []
    assert {url.removeprefix(server.url) for url in tab.requested} - {"data:,"} == {
        "/",
        "/status",
        "/v1/chat/completions",
    }


def test_an_answer_can_be_stopped_and_an_error_is_shown(
    tab: Tab, server: RunningServer, sentence_ids: list[int]
) -> None:
    manager = server.manager
    before = manager.on_submit

    def begin(submit: Submit) -> None:
        manager.send(*(each(streams_of(submit), [token]) for token in sentence_ids[:3]))

    manager.on_submit = begin
    try:
        tab.open(server.url + "/")
        _ask(tab, "Speak")
        tab.wait_for("document.querySelector('.turn.assistant .text').textContent")
        streams = set(streams_of(manager.submits[-1]))
        tab.value_of("document.getElementById('stop').click()")
        tab.wait_for(f"({_IS_DONE}).includes('stopped')")
        manager.wait_for(lambda: streams <= manager.cancelled)
    finally:
        manager.on_submit = before
    tab.value_of("document.getElementById('max_tokens').value = 100000")
    _ask(tab, "Too much")
    tab.wait_for("document.querySelector('.turn.failed .text')")
    assert "max_tokens" in tab.value_of("document.querySelector('.turn.failed .text').textContent")


def test_a_new_chat_has_nothing_of_the_one_that_was_still_streaming(
    tab: Tab, server: RunningServer, sentence_ids: list[int]
) -> None:
    manager = server.manager
    before = manager.on_submit
    manager.on_submit = lambda submit: manager.send(*(each(streams_of(submit), [token]) for token in sentence_ids[:3]))
    try:
        tab.open(server.url + "/")
        _ask(tab, "Speak")
        tab.wait_for("document.querySelector('.turn.assistant .text').textContent")
        tab.value_of("document.getElementById('clear').click()")
        tab.wait_for("!document.getElementById('send').disabled")
    finally:
        manager.on_submit = before
    tab.value_of("window.sent = []")
    tab.value_of(
        "{ const inner = window.fetch;"
        " window.fetch = (url, how) => { if (how.body) sent.push(how.body); return inner(url, how); } }"
    )
    _ask(tab, "Anew")
    tab.wait_for(_IS_DONE)
    (body,) = tab.value_of("window.sent")
    assert json.loads(body)["messages"] == [{"role": "user", "content": "Anew"}]


def test_the_page_is_used_with_the_keyboard_alone(tab: Tab, server: RunningServer) -> None:
    tab.open(server.url + "/")
    seen: list[str] = []
    while len(seen) < 40 and "clear" not in seen:
        tab.press(*_TAB)
        seen.append(tab.value_of("document.activeElement.id || document.activeElement.className"))
    assert seen[0] == "skip"
    for control in ("prompt", "send", "clear"):
        assert control in seen
    assert tab.value_of("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_fits_its_window_and_its_readers_colours(
    tab: Tab, server: RunningServer, width: int, is_dark: bool
) -> None:
    zero = {field.name: 0 for field in msgspec.structs.fields(Stats) if field.required}
    load = {"running": 28, "waiting": 3, "kv_pages_used": 3, "kv_pages_total": 4, "output_tokens_total": 9000}
    server.manager.send(Stats(**zero | load))
    tab.look(width, 900, is_dark=is_dark)
    tab.open(server.url + "/")
    _ask(tab, "What is the capital of France?")
    tab.wait_for(_IS_DONE)
    tab.wait_for("document.querySelector('.numbers').textContent.includes('28')")
    assert tab.value_of("document.documentElement.scrollWidth") <= width
    red, green, blue = map(int, tab.value_of("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"))
    assert (red + green + blue < 200) == is_dark
    _photograph(tab, f"{width}-{'dark' if is_dark else 'light'}")


def test_a_reader_gives_a_key_once_a_tab(
    browser: Chromium, tokenizer_dir: Path, tmp_path: Path, sentence_ids: list[int]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(json.dumps({"keys": [{"name": "alice", "key": "sk-a", "max_requests": 9}]}))

    def answer(manager: Any, submit: Submit) -> None:
        speak(manager, submit, sentence_ids)

    with running_server(tokenizer_dir, api_keys_file=str(keys), answer=answer) as server:
        tab = browser.new_tab()
        tab.open(server.url + "/")
        tab.wait_for("!document.getElementById('key').hidden")
        assert MODEL not in tab.value_of("document.documentElement.outerHTML")
        _photograph(tab, "key")
        for given in ("sk-wrong", "sk-a"):
            tab.value_of("document.getElementById('key-input').focus()")
            tab.type(given)
            tab.press(*_ENTER)
            if given == "sk-wrong":
                tab.wait_for("document.getElementById('key-error').textContent.includes('not accepted')")
        tab.wait_for("document.getElementById('live').textContent.includes('alice')")
        _ask(tab, "Hello")
        tab.wait_for(_IS_DONE)
        stores = "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie, location.href]"
        assert tab.value_of(stores) == ['{"toka-api-key":"sk-a"}', "{}", "", server.url + "/"]
        tab.open(server.url + "/")
        tab.wait_for("document.getElementById('live').textContent.includes('alice')")
        other = browser.new_tab()
        other.open(server.url + "/")
        other.wait_for("!document.getElementById('key').hidden")
        tab.value_of("document.getElementById('forget').click()")
        tab.wait_for("!document.getElementById('key').hidden")
        assert tab.value_of("sessionStorage.length") == 0
        assert MODEL not in tab.value_of("document.body.innerText")
