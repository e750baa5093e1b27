"""Token bytes, rendering and stop strings, against plain definitions of what they should give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from toka_engine.errors import ModelInvalidError
from toka_engine.messages import FINISH_LENGTH
from toka_engine.server.chat_template import load_chat_template
from toka_engine.server.generation_spec import GenerationSpec
from toka_engine.server.render import Renderer, TrackingRenderer
from toka_engine.server.replicas import Replicas
from toka_engine.server.stops import StopStrings
from toka_engine.server.streams import Choice, Generation, Streams
from toka_engine.server.tokenization import Tokenizer
from toka_engine.slot_parameters import Sampling

_BYTES = [bytes([byte]) for byte in range(256)]
"""A vocabulary of bytes: every way to split a character."""
_SMALL_TEXT = st.text(alphabet="ab\u00e9\u6f22", max_size=30)
_STOPS = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=3)


def _choice() -> Choice:
    spec = GenerationSpec(1, 1000, Sampling(), (), True)
    streams = Streams(Replicas([lambda message: None], 64))
    generation = Generation(streams, [np.array([1], np.int32)], spec)
    generation.__enter__()
    return generation.choices[0]


def _render(renderer: Renderer, ids: list[int], cuts: list[int]) -> list[str]:
    """Feed `ids` in groups that end at `cuts`; the last one ends the choice."""
    choice = _choice()
    pieces = []
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        choice.tokens = ids[begin:end]
        if end == len(ids):
            choice.finish_reason, choice.num_tokens = FINISH_LENGTH, len(ids)
        pieces.append(renderer.advance(choice))
        if renderer.finish_reason is not None:
            break
    return pieces


def _first_stop(text: str, stops: list[str]) -> int | None:
    """The plain definition: the first end of a match, and there the longest."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return end - max(found)
    return None


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_pieces_make_the_same_text_as_the_whole(data: bytes, cuts: list[int]) -> None:
    places = sorted(cut for cut in cuts if cut <= len(data))
    whole = data.decode("utf-8", "replace")
    assert "".join(_render(Renderer(_BYTES), list(data), places)) == whole
    tracking = TrackingRenderer(_BYTES, None, keeps_tokens=True)
    assert "".join(_render(tracking, list(data), places)) == whole


@settings(max_examples=300)
@given(text=_SMALL_TEXT, stops=_STOPS, cuts=st.lists(st.integers(0, 60), max_size=8))
def test_stop_strings_cut_where_the_plain_definition_says(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    places = sorted(cut for cut in cuts if cut <= len(data))
    renderer = TrackingRenderer(_BYTES, StopStrings(tuple(stops)), keeps_tokens=True)
    shown = "".join(_render(renderer, list(data), places))
    position = _first_stop(text, stops)
    assert shown == (text if position is None else text[:position])
    assert renderer.finish_reason == ("length" if position is None else "stop")
    tokens = renderer.take_shown()
    assert b"".join(_BYTES[token.token] for token in tokens).decode() == shown
    if position is not None:
        ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
        assert renderer.num_tokens == len(text[: ends[0]].encode())


@given(text=_SMALL_TEXT, stops=_STOPS)
def test_no_more_is_held_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    if _first_stop(text, stops) is not None:
        return
    renderer = TrackingRenderer(_BYTES, StopStrings(tuple(stops)), keeps_tokens=False)
    choice = _choice()
    choice.tokens = list(text.encode())
    held = text[len(renderer.advance(choice)) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_token_bytes_make_the_same_text_as_the_tokenizer(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for text in (
        "Hello, world!",
        "déjà vu  \n\n\t x",
        "漢字 \U0001f9d1\u200d\U0001f680",
        "<|im_start|>user\nHi",
    ):
        ids = tokenizer.encode([text], add_special_tokens=False)[0]
        assert tokenizer.text_of(ids) == reference.decode(ids.tolist(), skip_special_tokens=True)
    random = np.random.default_rng(1).integers(0, 49152, 20_000).astype(np.int32)
    assert tokenizer.text_of(random) == reference.decode(random.tolist(), skip_special_tokens=True)


def _write_tokenizer(folder: Path, decoder: Any, vocabulary: list[str]) -> None:
    model = tokenizers.models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = decoder
    made.save(str(folder / "tokenizer.json"))


def test_a_sentencepiece_vocabulary_gives_spaces_and_bytes(tmp_path: Path) -> None:
    decoders = tokenizers.decoders
    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    _write_tokenizer(tmp_path, decoder, ["\u2581Hello", "<0xE2>", "<0x82>", "<0xAC>", "x"])
    made = Tokenizer(tmp_path)
    assert made.text_of(np.array([0, 1, 2, 3, 4], np.int32)) == " Hello\u20acx"


def test_an_unknown_decoder_is_refused_at_the_start(tmp_path: Path) -> None:
    _write_tokenizer(tmp_path, tokenizers.decoders.WordPiece(), ["a"])
    with pytest.raises(ModelInvalidError, match="WordPiece"):
        Tokenizer(tmp_path)


def test_a_broken_tokenizer_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(ModelInvalidError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_broken_template_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelInvalidError, match="template"):
        load_chat_template(tmp_path, ())


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, ()) is None


def test_a_template_list_gives_its_default(tmp_path: Path) -> None:
    config = '{"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    template = load_chat_template(tmp_path, ())
    assert template is not None
    assert template.render([]) == ["yes"]


def test_padded_vocabularies_have_no_text(tokenizer_dir: Path) -> None:
    padded = Tokenizer(tokenizer_dir)
    padded.cover(50_000)
    assert padded.text_of(np.array([49_999], np.int32)) == ""
