"""Splitting an answer into reasoning, content and calls: the same however it is cut, and nothing is lost."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from toka_engine.server.calls.source import MAX_HELD, Part
from toka_engine.server.splitting import Splitter

from tests.unit.server.transcripts import FORMATS, PARAMETERS, Call, Transcript, transcripts

CASES = [
    pytest.param(name, case, id=f"{name}-{number}") for name in FORMATS for number, case in enumerate(transcripts(name))
]


def splitter(name: str, **options: Any) -> Splitter:
    return Splitter(FORMATS[name].reader(PARAMETERS), **options)


def read(subject: Splitter, pieces: list[str]) -> list[Part]:
    """Return all parts, those that belong together as one."""
    parts: list[Part] = []
    for news in (*map(subject.feed, pieces), subject.finish()):
        for part in news:
            if parts and part.kind != "call" and parts[-1][::2] == part[::2]:
                parts[-1] = part._replace(text=parts[-1].text + part.text)
            else:
                parts.append(part)
    return parts


def text_of(parts: list[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def calls_of(parts: list[Part]) -> list[Call]:
    names = [part.text for part in parts if part.kind == "call"]
    return [
        (name, json.loads("".join(part.text for part in parts if part.kind == "arguments" and part.call == number)))
        for number, name in enumerate(names)
    ]


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("name", FORMATS)
def test_there_are_sixty_transcripts_and_more(name: str) -> None:
    assert len(transcripts(name)) >= 60


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_transcript_has_its_content_and_its_calls(name: str, case: Transcript) -> None:
    parts = read(splitter(name), [case.text])
    assert text_of(parts, "content") == case.content
    assert calls_of(parts) == case.calls


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_transcript_in_pieces_is_the_same(name: str, case: Transcript) -> None:
    whole = read(splitter(name), [case.text])
    assert read(splitter(name), list(case.text)) == whole
    for size in (3, 50):
        pieces = [case.text[begin : begin + size] for begin in range(0, len(case.text), size)]
        assert read(splitter(name), pieces) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_two_pieces_are_the_same_wherever_the_cut_is(name: str) -> None:
    for case in FORMATS[name].odd:
        whole = read(splitter(name), [case.text])
        for place in range(len(case.text)):
            assert read(splitter(name), [case.text[:place], case.text[place:]]) == whole


@pytest.mark.parametrize(("name", "case"), CASES)
def test_an_answer_that_ends_anywhere_is_the_same_in_pieces(name: str, case: Transcript) -> None:
    for end in range(0, len(case.text), max(1, len(case.text) // 20)):
        text = case.text[:end]
        assert read(splitter(name), list(text)) == read(splitter(name), [text])


_TOKENS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "now",
        ">",
        "<parameter=a>",
        "</parameter>",
        "</function>",
        "{",
        "}",
    ),
    *('"name": "now"', '"arguments": ', '"', "\\", ",", "[", "]", "(", ")", "='", "a=", "'", "\n", " ", "x", "\u00e9"),
    *("<think>", "</think>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "<", "</", ":", "1", "True", ";"),
]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.sampled_from(_TOKENS), max_size=25),
    places=st.lists(st.integers(0, 200), max_size=8),
    options=st.sampled_from(
        [{}, {"max_calls": 1}, {"has_reasoning": True}, {"has_reasoning": True, "begins_in_reasoning": True}]
    ),
)
def test_any_text_in_any_pieces_is_the_same(
    name: str, tokens: list[str], places: list[int], options: dict[str, Any]
) -> None:
    text = "".join(tokens)
    whole, pieces = splitter(name, **options), splitter(name, **options)
    assert read(pieces, cut(text, places)) == read(whole, [text])
    assert pieces.num_reasoning_bytes == whole.num_reasoning_bytes
    assert pieces.is_complete == whole.is_complete


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab <>{}[]()\"'=,;\n/\u00e9", max_size=60))
def test_text_without_a_call_is_content_to_the_last_character(name: str, text: str) -> None:
    parts = read(splitter(name), list(text))
    if not calls_of(parts):
        assert text_of(parts, "content") == text


# ---------------------------------------------------------------- what a user sees while it comes


def test_content_is_shown_at_once() -> None:
    subject = splitter("hermes")
    assert subject.feed("Hello") == [Part("content", "Hello")]
    assert subject.feed(" a<b") == [Part("content", " a<b")]
    assert subject.feed(" <tool") == []
    assert subject.feed("s>") == [Part("content", " <tools>")]


def test_arguments_are_shown_as_they_come_and_as_they_stand() -> None:
    subject = splitter("hermes")
    assert subject.feed('<tool_call>\n{"name": "now", "arguments": ') == []
    assert subject.feed('{"a" :') == [Part("call", "now"), Part("arguments", '{"a" :')]
    assert subject.feed(" 1.50, ") == [Part("arguments", " 1.50, ")]
    assert subject.feed('"b": "}"}}\n</tool_call>') == [Part("arguments", '"b": "}"}')]
    assert subject.finish() == []


def test_strings_of_tagged_arguments_are_shown_as_they_come() -> None:
    subject = splitter("qwen_xml")
    subject.feed("<tool_call>\n<function=write_file>\n<parameter=text>\n")
    assert subject.feed('one "line"\n') == [Part("arguments", 'one \\"line\\"')]
    assert subject.feed("two") == [Part("arguments", "\\ntwo")]


def test_json_that_is_no_call_is_content_as_soon_as_that_shows() -> None:
    subject = splitter("llama_json")
    assert subject.feed('{"name": "Ali') == []
    assert subject.feed('ce"') == [Part("content", '{"name": "Alice"')]
    assert splitter("llama_json").feed('{"city"') == [Part("content", '{"city"')]


def test_a_call_that_is_cut_off_keeps_what_there_is_of_its_arguments() -> None:
    parts = read(splitter("hermes"), ['<tool_call>{"name": "now", "arguments": {"a": "b'])
    assert parts == [Part("call", "now"), Part("arguments", '{"a": "b')]


def test_what_is_cut_off_before_the_next_call_is_not_content() -> None:
    text = FORMATS["hermes"].write([("now", {})])
    parts = read(splitter("hermes"), [text + "\n<tool_ca"])
    assert text_of(parts, "content") == ""
    assert text_of(read(splitter("hermes"), ["Hi\n<tool_ca"]), "content") == "Hi\n<tool_ca"


@pytest.mark.parametrize("name", FORMATS)
def test_a_further_call_is_nowhere_content_wherever_it_is_cut_off(name: str) -> None:
    arguments = {"path": "a", "text": "b"}
    one = len(FORMATS[name].write([("write_file", arguments)]))
    both = FORMATS[name].write([("write_file", arguments), ("write_file", arguments)])
    shown = {end: text_of(read(splitter(name), [both[:end]]), "content") for end in range(one, len(both))}
    assert {end: text for end, text in shown.items() if text} == {}


def test_nothing_follows_the_last_call_that_is_wanted() -> None:
    subject = splitter("hermes", max_calls=1)
    text = FORMATS["hermes"].write([("now", {}), ("now", {})])
    assert len(calls_of(read(subject, [text + "more"]))) == 1
    assert subject.is_complete


def test_no_more_than_128_calls_are_read() -> None:
    subject = splitter("hermes")
    parts = read(subject, [FORMATS["hermes"].write([("now", {})] * 130)])
    assert len(calls_of(parts)) == 128
    assert subject.is_complete


def test_what_never_becomes_a_call_is_not_held_for_ever() -> None:
    subject = splitter("hermes")
    shown = 0
    for _ in range(2 * MAX_HELD // 1000):
        shown += sum(len(part.text) for part in subject.feed('<tool_call>{"a": "' if not shown else "x" * 1000))
        shown += sum(len(part.text) for part in subject.feed("y" * 1000))
    assert shown > MAX_HELD


@pytest.mark.parametrize("name", FORMATS)
def test_a_large_answer_in_one_piece_is_read_in_a_moment(name: str) -> None:
    argument = {"path": "x", "text": 'line of text, with "quotes" and [brackets]\n' * 5000}
    text = FORMATS[name].write([("write_file", argument)])
    assert calls_of(read(splitter(name), [text])) == [("write_file", argument)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{" * 100_000, "<tool_call>" * 10_000, "<tool_call>{" + '"a":[' * 50_000]
)
def test_deep_nesting_is_content_and_not_a_failure(name: str, text: str) -> None:
    parts = read(splitter(name), [text])
    assert text_of(parts, "content") == text


# ---------------------------------------------------------------- reasoning

_REASONING = [
    ("<think>\nLet me see.\n</think>\n\nParis.", "Let me see.", "Paris."),
    ("<think></think>Paris.", "", "Paris."),
    ("\n<think>a</think>b", "a", "b"),
    ("<think>never closed", "never closed", ""),
    ("No thought.", "", "No thought."),
    ("  <thin", "", "  <thin"),
    ("a <think>b</think>", "", "a <think>b</think>"),
    ("<think>a < b </thin> c</think>d", "a < b </thin> c", "d"),
]


@pytest.mark.parametrize(("text", "reasoning", "content"), _REASONING)
def test_reasoning_is_split_off(text: str, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        parts = read(Splitter(has_reasoning=True), pieces)
        assert text_of(parts, "reasoning") == reasoning
        assert text_of(parts, "content") == content


@pytest.mark.parametrize("opening", ["", "<think>\n", "\n"])
def test_reasoning_may_be_opened_by_the_prompt(opening: str) -> None:
    text = f"{opening}I think.\n</think>\n\nYes"
    for pieces in ([text], list(text)):
        subject = Splitter(has_reasoning=True, begins_in_reasoning=True)
        parts = read(subject, pieces)
        assert (text_of(parts, "reasoning"), text_of(parts, "content")) == ("I think.", "Yes")
        assert subject.num_reasoning_bytes == len(text.encode()) - len("\n\nYes")


def test_a_call_inside_reasoning_is_reasoning() -> None:
    call = FORMATS["hermes"].write([("now", {})])
    parts = read(splitter("hermes", has_reasoning=True), [f"<think>{call}</think>{call}"])
    assert text_of(parts, "reasoning") == call
    assert calls_of(parts) == [("now", {})]
