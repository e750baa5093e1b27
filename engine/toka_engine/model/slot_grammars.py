"""Grammars of the slots: one matcher for each slot whose output must follow one.

A matcher holds the state of one output. It takes in each token that was sampled for its slot, and says which tokens may
come next. It works on the host alone and knows no device. Every rank that samples has its own, and all are alike.
"""

from __future__ import annotations

import logging

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from toka_engine.messages import GRAMMAR_FAILED, Int32s, Step

logger = logging.getLogger("toka.model")

_ALL = -1
"""A word of a mask that allows all of its 32 tokens."""


class SlotGrammars:
    """Compiled grammars by number, and matchers by slot. `add` may be called by another thread; the rest may not."""

    def __init__(self, max_seqs: int, vocab_size: int, num_threads: int = 1) -> None:
        """`num_threads`: threads of the library's own that fill many masks; 1: the caller's alone."""
        self.num_words = -(-vocab_size // 32)
        self._executor = LLExecutor(num_threads) if num_threads > 1 else None
        self._templates: dict[int, LLMatcher] = {}
        self._matchers: list[LLMatcher | None] = [None] * max_seqs
        self._has_failed: NDArray[np.bool_] = np.zeros(max_seqs, np.bool_)

    def add(self, number: int, template: LLMatcher) -> None:
        """Let slots refer to `template`, which nothing else may use any more."""
        self._templates[number] = template

    def forget(self, number: int) -> None:
        """Drop a grammar that no slot will refer to; slots that still have it keep it until they change hands."""
        self._templates.pop(number, None)

    def set_up(self, step: Step) -> None:
        """Give the new slots of `step` their matchers, with what they have generated so far."""
        new = step.new
        if "grammar" not in new.columns:
            for slot in new.slots.tolist():
                self._matchers[slot] = None
            return
        begin = 0
        for slot, number, count in zip(
            new.slots.tolist(), new["grammar"].tolist(), new["num_sampled"].tolist(), strict=True
        ):
            self._matchers[slot] = matcher = self._templates[number].deep_copy() if number else None
            self._has_failed[slot] = False
            if matcher is not None and count:
                if not matcher.consume_tokens(step.grammar_outputs[begin : begin + count].tolist()):
                    self._note_failure(slot, matcher)
                begin += count

    def fill(self, slots: Int32s, bits: NDArray[np.int32]) -> None:
        """Write into bits [k, num_words] which tokens may come next in `slots` [k], all of which have a grammar.

        Bit i of word w stands for token 32 * w + i. A matcher that fails allows all; its tokens count no more.
        """
        num_bytes = self.num_words * bits.itemsize
        following = [(self._matchers[slot], row) for row, slot in enumerate(slots.tolist())]
        live = [(matcher, row) for matcher, row in following if matcher is not None and not matcher.is_error()]
        if self._executor is not None and len(live) > 1:
            self._executor.unsafe_compute_mask_ptr(live, bits.ctypes.data, num_bytes, bits.shape[0])
        else:
            first = bits.ctypes.data
            for matcher, row in live:
                matcher.unsafe_compute_mask_ptr(first + row * num_bytes, num_bytes)
        if len(live) < len(following):
            dead = set(range(len(following))).difference(row for _, row in live)
            bits[list(dead)] = _ALL
        for matcher, row in live:
            if matcher.is_error():
                bits[row] = _ALL
                self._note_failure(int(slots[row]), matcher)

    def consume(self, slots: Int32s, ids: NDArray[np.int32]) -> None:
        """Take in the tokens `ids` [k] that were sampled for `slots` [k]; negative ones are no tokens."""
        taken = []
        for slot, token in zip(slots.tolist(), ids.tolist(), strict=True):
            matcher = self._matchers[slot]
            # Steps run ahead: tokens after the one that ended the text, or after a failure, are nobody's.
            if matcher is not None and token >= 0 and not matcher.is_stopped():
                taken.append((slot, matcher, token))
        if self._executor is not None and len(taken) > 1:
            done = self._executor.consume_token_par([(matcher, token) for _, matcher, token in taken])
        else:
            done = [matcher.consume_token(token) for _, matcher, token in taken]
        for (slot, matcher, _), is_taken in zip(taken, done, strict=True):
            if not is_taken:
                self._note_failure(slot, matcher)

    def mark_failed(self, slots: Int32s, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return `ids` [k] with GRAMMAR_FAILED where the matcher of one of `slots` [k] has failed."""
        return np.where(self._has_failed[slots], np.int32(GRAMMAR_FAILED), ids)

    def _note_failure(self, slot: int, matcher: LLMatcher) -> None:
        self._has_failed[slot] = True
        logger.error("event=grammar_failed slot=%d reason=%s", slot, matcher.stop_reason())
