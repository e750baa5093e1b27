"""The grammar checker's process: compiles one source after another, and dies of those that take too much.

The server starts it, sends it sources and reads verdicts, over pipes. A source that exceeds the limit of memory or of
CPU time ends this process and nothing else; where it does not answer, the server ends it.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from toka_engine.grammar.compiling import GrammarError, compile_grammar, find_dropped_keywords, load_vocabulary
from toka_engine.grammar.protocol import LENGTH, Setup, Verdict
from toka_engine.grammar.source import GrammarSource
from toka_engine.portable import end_with_parent, limit_memory_growth

MAX_CPU_S = 2
"""CPU time for one source, to a second."""
_MAX_GROWTH_BYTES = 384 << 20
"""Memory that one source may take."""
_MAX_KEPT_BYTES = 48 << 20
"""Growth of the process beyond which it ends after its answer, to give the memory back."""
_NICENESS = 5
"""This process stands back by so much where the CPU is short: others wait for tokens. It must not starve either."""
_NUM_STEPS = 24
"""Tokens of the random walk through each grammar."""


def check_source(source: GrammarSource, vocabulary: LLTokenizer) -> Verdict:
    """Compile `source` and follow it for some tokens."""
    try:
        matcher = compile_grammar(source, vocabulary)
        dropped = find_dropped_keywords(matcher)
        _walk(matcher, vocabulary.vocab_size)
    except GrammarError as error:
        return Verdict(str(error))
    return Verdict(dropped=dropped)


def _walk(matcher: LLMatcher, vocab_size: int) -> None:
    """Choose allowed tokens at random. Raises GrammarError where there is none."""
    chance = random.Random(0)
    for _ in range(_NUM_STEPS):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[:vocab_size])
        if matcher.is_error() or not allowed.size or (matcher.is_stopped() and not matcher.is_accepting()):
            raise GrammarError("no text fits it, or it takes too much work to follow")
        if matcher.is_stopped():
            return
        if not matcher.consume_token(int(chance.choice(allowed))):
            raise GrammarError("it takes too much work to follow")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the other end is gone or there is a reason to start afresh."""
    setup = msgspec.msgpack.decode(_read(requests), type=Setup)
    vocabulary = load_vocabulary(Path(setup.tokenizer_dir), setup.vocab_size, setup.end_ids)
    check_source(GrammarSource("json_object", ""), vocabulary)  # what is made at the first use
    limit_memory_growth(_MAX_GROWTH_BYTES)
    base = _peak_bytes()
    _write(answers, Verdict())
    while frame := _read(requests):
        _limit_cpu()
        verdict = check_source(msgspec.msgpack.decode(frame, type=GrammarSource), vocabulary)
        if _peak_bytes() > base + _MAX_KEPT_BYTES:
            _write(answers, msgspec.structs.replace(verdict, is_last=True))
            return
        _write(answers, verdict)


def _read(stream: BinaryIO) -> bytes:
    """Return the next frame; b"" at the end."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _write(stream: BinaryIO, verdict: Verdict) -> None:
    body = msgspec.msgpack.encode(verdict)
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limit_cpu() -> None:
    """Have the kernel end this process when the next source has taken its CPU time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + MAX_CPU_S, hard))


def run() -> None:
    """Run the process on its standard streams."""
    end_with_parent()
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
