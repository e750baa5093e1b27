"""The grammar checker's process: has each source compiled by a child of its own, which may die of it.

The server starts it, sends it sources and reads verdicts, over pipes. A child is a fork of this process: it begins with
the library and the vocabulary loaded, within milliseconds, and takes with it whatever memory its source took. One that
exceeds the limit of memory, of CPU time or of time ends alone. Nothing here has threads, which a fork would lose.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec
from llguidance import LLMatcher, LLTokenizer

from toka_engine.grammar.compiling import GrammarError, compile_grammar, find_dropped_keywords, load_vocabulary
from toka_engine.grammar.protocol import LENGTH, Setup, Verdict
from toka_engine.grammar.source import GrammarSource
from toka_engine.portable import end_with_parent, limit_memory_growth

MAX_CPU_S = 2
"""CPU time for one source."""
_MAX_S = 2.5
"""Wall time for one source, less than the server waits."""
_MIN_BLAMED_S = 1.0
"""CPU time of a child that ran out of wall time, from which on its source is to blame."""
_MAX_GROWTH_BYTES = 384 << 20
"""Memory that one source may take."""
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
    every = (1 << vocab_size) - 1
    for _ in range(_NUM_STEPS):
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & every
        if matcher.is_error() or not allowed or (matcher.is_stopped() and not matcher.is_accepting()):
            raise GrammarError("no text fits it, or it takes too much work to follow")
        if matcher.is_stopped():
            return
        if not matcher.consume_token(_choose_bit(allowed, chance)):
            raise GrammarError("it takes too much work to follow")


def _choose_bit(bits: int, chance: random.Random) -> int:
    """Return the place of one of the bits that are set, each as likely as the others (numpy would take longer to load
    than everything else here).
    """
    number, place, width = chance.randrange(bits.bit_count()), 0, bits.bit_length()
    while width > 1:
        half = width // 2
        low = bits & ((1 << half) - 1)
        num_low = low.bit_count()
        if number < num_low:
            bits, width = low, half
        else:
            bits, width = bits >> half, width - half
            number, place = number - num_low, place + half
    return place


def check_apart(source: GrammarSource, vocabulary: LLTokenizer) -> Verdict:
    """Have a child check `source`; say so where it did not live through it."""
    reader, writer = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if not child:
        _be_child(parent, writer, source, vocabulary)
    os.close(writer)
    with open(reader, "rb") as answer:
        raw = answer.read()  # to its end: the child's
    _, status, usage = os.wait4(child, 0)
    if status == 0:
        return msgspec.msgpack.decode(raw, type=Verdict)
    worked_s = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM and worked_s < _MIN_BLAMED_S:
        return Verdict(failure="starved")
    return Verdict(failure="too_much")


def _be_child(parent: int, writer: int, source: GrammarSource, vocabulary: LLTokenizer) -> NoReturn:
    """Write the verdict and end. The kernel ends this process when its source has taken its time."""
    code = 1
    try:
        end_with_parent()
        if os.getppid() != parent:  # which has ended before
            os._exit(code)
        os.close(sys.stdin.fileno())  # where the parent alone reads and answers
        os.close(sys.stdout.fileno())
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, hard))
        signal.setitimer(signal.ITIMER_REAL, _MAX_S)
        verdict = check_source(source, vocabulary)
        with open(writer, "wb") as answer:
            answer.write(msgspec.msgpack.encode(verdict))
        code = 0
    except BaseException as error:  # without its message, which may quote the source
        traceback.print_tb(error.__traceback__)
        print(type(error).__name__, file=sys.stderr)
    finally:
        os._exit(code)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the other end is gone."""
    setup = msgspec.msgpack.decode(_read(requests), type=Setup)
    vocabulary = load_vocabulary(Path(setup.tokenizer_dir), setup.vocab_size, setup.end_ids)
    check_source(GrammarSource("json_object", ""), vocabulary)  # what is made at the first use
    limit_memory_growth(_MAX_GROWTH_BYTES)  # which children inherit; this process itself does not grow
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, all of it
    _write(answers, Verdict())
    while frame := _read(requests):
        _write(answers, check_apart(msgspec.msgpack.decode(frame, type=GrammarSource), vocabulary))


def _read(stream: BinaryIO) -> bytes:
    """Return the next frame; b"" at the end."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _write(stream: BinaryIO, verdict: Verdict) -> None:
    body = msgspec.msgpack.encode(verdict)
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def run() -> None:
    """Run the process on its standard streams."""
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
