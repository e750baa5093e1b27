"""Compiles the grammars of requests in a thread of its own, while the worker executes steps.

The library releases the interpreter lock while it compiles. A grammar is announced to the manager when slots may refer
to it. Its vocabulary, which takes a third of a second and 30 MB to make, is made for the first grammar.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from llguidance import LLTokenizer

from toka_engine.errors import PeerClosedError
from toka_engine.grammar.compiling import GrammarError, compile_grammar, load_vocabulary
from toka_engine.grammar.source import GrammarSource
from toka_engine.messages import GrammarReady
from toka_engine.model.slot_grammars import SlotGrammars

logger = logging.getLogger("toka.model")


class GrammarCompiler:
    """The thread. It ends with the process."""

    def __init__(
        self, tokenizer_dir: Path, vocab_size: int, grammars: SlotGrammars, send: Callable[[GrammarReady], None]
    ) -> None:
        """`send` is called in the thread."""
        self._tokenizer_dir, self._vocab_size = tokenizer_dir, vocab_size
        self._grammars, self._send = grammars, send
        self._waiting: queue.SimpleQueue[tuple[int, GrammarSource]] = queue.SimpleQueue()
        self._vocabulary: LLTokenizer | None = None
        self._end_ids: tuple[int, ...] = ()
        self._thread: threading.Thread | None = None

    def take(self, number: int, source: GrammarSource | None) -> None:
        """Compile `source` soon, and say so to the manager; None: forget what has this number."""
        if source is None:
            self._grammars.forget(number)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
        self._waiting.put((number, source))

    def _run(self) -> None:
        while True:
            number, source = self._waiting.get()
            try:
                self._send(self._compile(number, source))
            except PeerClosedError:
                return  # the worker's main loop finds the same, and ends

    def _compile(self, number: int, source: GrammarSource) -> GrammarReady:
        end_ids = source.end_ids
        try:
            if self._vocabulary is None or end_ids != self._end_ids:
                self._vocabulary = load_vocabulary(self._tokenizer_dir, self._vocab_size, end_ids)
                self._end_ids = end_ids
            template = compile_grammar(source, self._vocabulary)
        except (GrammarError, ValueError, OSError) as error:  # the checker, with the same files, found none of these
            logger.error("event=grammar_not_compiled number=%d error=%s", number, type(error).__name__)
            return GrammarReady(number, str(error))
        self._grammars.add(number, template)
        return GrammarReady(number)
