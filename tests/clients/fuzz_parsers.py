"""Fuzzes what reads other people's text: `python -m tests.clients.fuzz_parsers [SECONDS]`, 600 by default.

atheris, in an environment of its own, makes inputs that reach new lines. Two promises: the splitter and the renderers
give the same from any pieces as from the whole; and the decoder of each endpoint's bodies turns any bytes into a
request or a 4xx, and raises nothing else. An input that breaks one is printed, and the exit code is not 0.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_INSIDE = "--inside"


def run(seconds: int) -> int:
    """Run this module within atheris's environment, with this one's packages behind its own."""
    from tests.clients.environments import python_of

    python = python_of("atheris", Path(__file__).parent / "parsers_pins.txt")
    folders = [_ROOT, _ROOT / "engine", sysconfig.get_path("purelib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    with tempfile.TemporaryDirectory() as corpus:
        limits = [f"-max_total_time={seconds}", "-max_len=512", "-timeout=60", corpus]
        command = [python, "-m", "tests.clients.fuzz_parsers", _INSIDE, *limits]
        return subprocess.run(command, cwd=corpus, env=environment).returncode


def fuzz_inside() -> None:
    """Hand the targets to atheris, which ends the process."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["toka_engine.server"]):
        targets = _make_targets()

    def try_one(data: bytes) -> None:
        source = atheris.FuzzedDataProvider(data)
        targets[source.ConsumeIntInRange(0, len(targets) - 1)](source)

    atheris.Setup([sys.argv[0], *(each for each in sys.argv[1:] if each != _INSIDE)], try_one)
    atheris.Fuzz()


def _make_targets() -> list[Any]:
    from toka_engine.messages import FINISH_STOP
    from toka_engine.server.calls.json_calls import HermesCalls, LlamaCalls
    from toka_engine.server.calls.pythonic_calls import PythonicCalls
    from toka_engine.server.calls.xml_calls import XmlCalls
    from toka_engine.server.chat_plan import ChatRequest
    from toka_engine.server.decoding import BodyDecoder
    from toka_engine.server.endpoints.completions import CompletionRequest
    from toka_engine.server.endpoints.messages import MessagesRequest
    from toka_engine.server.endpoints.responses import ResponsesRequest
    from toka_engine.server.errors import ApiError
    from toka_engine.server.grammar_requests import read_grammar
    from toka_engine.server.render import Renderer, TrackingRenderer
    from toka_engine.server.splitting import Splitter
    from toka_engine.server.stops import StopStrings

    from tests.unit.server.test_splitting import _TOKENS, read
    from tests.unit.server.test_text import _BYTES, _choice
    from tests.unit.server.transcripts import PARAMETERS

    formats = (HermesCalls, LlamaCalls, PythonicCalls, XmlCalls)
    decoders = [BodyDecoder(kind) for kind in (CompletionRequest, ChatRequest, MessagesRequest, ResponsesRequest)]

    def text_of(source: Any) -> str:
        """A text of the formats' own words and of any others."""
        parts = []
        for _ in range(source.ConsumeIntInRange(0, 40)):
            index = source.ConsumeIntInRange(0, len(_TOKENS) + 3)
            parts.append(_TOKENS[index] if index < len(_TOKENS) else source.ConsumeUnicodeNoSurrogates(6))
        return "".join(parts)

    def pieces_of(source: Any, whole: Any) -> list[Any]:
        places = sorted({0, len(whole), *(source.ConsumeIntInRange(0, len(whole)) for _ in range(8))})
        return [whole[begin:end] for begin, end in itertools.pairwise(places)]

    def split(source: Any) -> None:
        calls = formats[source.ConsumeIntInRange(0, len(formats) - 1)](PARAMETERS)
        has_reasoning = source.ConsumeBool()
        options: dict[str, Any] = {
            "has_reasoning": has_reasoning,
            "begins_in_reasoning": has_reasoning and source.ConsumeBool(),
            "max_calls": source.ConsumeIntInRange(1, 3),
        }
        text = text_of(source)
        whole, parts, each = (Splitter(calls, **options) for _ in range(3))
        expected = read(whole, [text])
        for subject, pieces in ((parts, pieces_of(source, text)), (each, list(text))):
            found = read(subject, pieces)
            if found != expected or subject.num_reasoning_bytes != whole.num_reasoning_bytes:
                raise AssertionError(f"{calls} {options} {pieces!r}: {found} in place of {expected}")

    def render(source: Any) -> None:
        stops = StopStrings(tuple(source.ConsumeUnicodeNoSurrogates(3) or "a" for _ in range(2)))
        tokens = list(source.ConsumeBytes(60))
        shown = []
        for pieces in ([tokens], pieces_of(source, tokens), [[token] for token in tokens]):
            renderer, choice, text = TrackingRenderer(_BYTES, stops, keeps_tokens=True), _choice(), ""
            plain, plain_choice, plain_text = Renderer(_BYTES), _choice(), ""
            for number, piece in enumerate(pieces or [[]]):
                is_last = number + 1 >= len(pieces)
                for each in (choice, plain_choice):
                    each.tokens = list(piece)
                    each.finish_reason, each.num_tokens = (FINISH_STOP if is_last else None), len(tokens)
                text, plain_text = text + renderer.advance(choice), plain_text + plain.advance(plain_choice)
            if plain_text != bytes(tokens).decode("utf-8", "replace"):
                raise AssertionError(f"{pieces}: {plain_text!r}")
            shown.append((text, renderer.finish_reason, renderer.num_tokens))
        if len(set(shown)) > 1:
            raise AssertionError(f"{tokens} {stops}: {shown}")

    def decode(source: Any) -> None:
        decoder = decoders[source.ConsumeIntInRange(0, len(decoders) - 1)]
        reports_unknown = source.ConsumeBool()
        try:
            request, _ = decoder.decode(source.ConsumeBytes(512), reports_unknown=reports_unknown)
            if isinstance(request, CompletionRequest | ChatRequest):
                read_grammar(request)
        except ApiError as error:
            if not 400 <= error.status < 500:
                raise AssertionError(f"status {error.status}") from error

    return [split, render, decode]


def main() -> int:
    """Run with the arguments of the command line."""
    if _INSIDE in sys.argv:
        fuzz_inside()
    return run(int(sys.argv[1]) if len(sys.argv) > 1 else 600)


if __name__ == "__main__":
    sys.exit(main())
