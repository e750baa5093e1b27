"""Words of several tokens that may not be sampled: the last token of a word is barred where the others have just been.

The tokens of a sequence are stored with its keys and values, on the device: when a row is sampled, the forward has just
written the last of them. So the comparison is made there, and nothing waits for the host, however many steps are in
flight, nor is there a state that preemption would lose. The host alone knows how many tokens a slot has sampled, which
decides where the tokens to be compared are. All words of a step are planned at once, as arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Int32s, Step, WordList

_NO_IDS: Int32s = np.empty(0, np.int32)


class WordArrays(NamedTuple):
    """Words that are barred in some rows of logits, and where the tokens are that decide about each."""

    rows: Int32s  # [w]
    ids: Int32s  # [w]: barred where all tokens before it are found
    lengths: Int32s  # [w]: how many these are
    owners: Int32s  # [t]: index into the w words
    tokens: Int32s  # [t]
    sources: Int32s  # [t]: the slot whose sequence is to have the token ...
    positions: Int32s  # [t]: ... at this place

    def place(self, at: Int32s, first: int = 0, width: int | None = None) -> WordArrays:
        """Return the words of logits from token `first` on; at[i] is the new row of row i, or -1 for none."""
        rows, ids = at[self.rows], self.ids - np.int32(first)
        is_here = rows >= 0
        if width is not None:
            is_here &= (ids >= 0) & (ids < width)
        parts = is_here[self.owners]
        places = np.cumsum(is_here, dtype=np.int32) - np.int32(1)
        return WordArrays(
            rows[is_here],
            ids[is_here],
            self.lengths[is_here],
            places[self.owners[parts]],
            self.tokens[parts],
            self.sources[parts],
            self.positions[parts],
        )


NO_WORDS = WordArrays(*[_NO_IDS] * len(WordArrays._fields))


@dataclass(frozen=True, slots=True)
class WordPlan:
    """The words of one step's samples."""

    rows: NDArray[np.int64]  # [r] of the plan's rows, ascending
    logit_rows: Int32s  # [r]: each row's row of logits; of rows that share one, none has sampled a token yet
    arrays: WordArrays
    """Their rows are indices into `rows`."""

    def select(self, rows: NDArray[np.int64]) -> WordPlan | None:
        """Return the words of some of the plan's rows, ascending, as if there were no others; None if there are none.

        Each of these rows is to have a row of logits of its own, in their order.
        """
        is_chosen = np.isin(self.rows, rows, assume_unique=True)
        if not is_chosen.any():
            return None
        at = np.searchsorted(rows, self.rows[is_chosen])
        places = np.where(is_chosen, np.cumsum(is_chosen, dtype=np.int32) - 1, -1).astype(np.int32)
        return WordPlan(at, at.astype(np.int32), self.arrays.place(places))


class BarredWords:
    """The words of all slots, as arrays from which those of a step are picked."""

    def __init__(self, max_seqs: int) -> None:
        self._lists: dict[int, WordList] = {}
        """By slot."""
        self._first = np.zeros(max_seqs, np.int32)
        self._count = np.zeros(max_seqs, np.int32)
        self._take_over([])

    def __bool__(self) -> bool:
        return bool(self._lists)

    def set_up(self, step: Step) -> None:
        """Take over the new slots of `step`."""
        given = [each for each in step.edits if each.edits.words.ids.size]
        slots = step.new.slots.tolist()
        if not given and self._lists.keys().isdisjoint(slots):
            return
        for slot in slots:
            self._lists.pop(slot, None)
        for each in given:
            self._lists.update(dict.fromkeys(each.slots.tolist(), each.edits.words))
        self._first[:] = self._count[:] = 0
        lists = {id(words): words for words in self._lists.values()}
        begins = dict(zip(lists, np.cumsum([0, *(words.ids.size for words in lists.values())]).tolist(), strict=False))
        for slot, words in self._lists.items():
            self._first[slot], self._count[slot] = begins[id(words)], words.ids.size
        self._take_over(list(lists.values()))

    def _take_over(self, lists: list[WordList]) -> None:
        self._ids = np.concatenate([_NO_IDS, *(words.ids for words in lists)])
        self._lengths = np.concatenate([_NO_IDS, *(words.lengths for words in lists)])
        self._tokens = np.concatenate([_NO_IDS, *(words.tokens for words in lists)])
        self._begins = np.cumsum(self._lengths, dtype=np.int32) - self._lengths

    def plan(
        self,
        slots: Int32s,  # [R]
        logit_rows: Int32s | None,  # [R]; None: in order
        sources: Int32s,  # [R]: the slot whose pages hold the row's tokens
        lengths: Int32s,  # [R]: how many tokens, prompt and generated
        num_sampled: Int32s,  # [R]
    ) -> WordPlan | None:
        """Return the words of a step's samples; None if none of their slots has any."""
        rows = np.flatnonzero(self._count[slots])
        if not rows.size:
            return None
        own = slots[rows]
        owners = np.repeat(np.arange(rows.size, dtype=np.int32), self._count[own])
        words = _join_ranges(self._first[own], self._count[own])
        # Only generated tokens count: a word that began in the prompt may be ended.
        is_near = self._lengths[words] <= num_sampled[rows][owners]
        owners, words = owners[is_near], words[is_near]
        sizes = self._lengths[words]
        parts = _join_ranges(self._begins[words], sizes)
        word_of = np.repeat(np.arange(words.size, dtype=np.int32), sizes)
        row_of = rows[owners[word_of]]
        behind = (self._begins + self._lengths)[words][word_of] - parts  # how far before the end of the sequence
        return WordPlan(
            rows,
            rows.astype(np.int32) if logit_rows is None else logit_rows[rows],
            WordArrays(
                owners,
                self._ids[words],
                sizes,
                word_of,
                self._tokens[parts],
                sources[row_of],
                (lengths[row_of] - behind).astype(np.int32),
            ),
        )


def apply_words(logits: torch.Tensor, words: list[torch.Tensor], found: torch.Tensor) -> None:
    """Change logits [n, width] fp32 in place. `words` are tensors on its device, as `WordArrays`; found [t] int32 has
    the tokens at its sources and positions.
    """
    rows, ids, lengths, owners, tokens = words[:5]
    num_equal = torch.zeros_like(lengths).index_add_(0, owners.long(), (found == tokens).int())
    values = torch.zeros(lengths.shape[0], device=logits.device).masked_fill_(num_equal == lengths, float("-inf"))
    # Several words may end with the same token: sums of zero and minus infinity do not depend on their order.
    logits.index_put_((rows.long(), ids.long()), values, accumulate=True)


def _join_ranges(begins: Int32s, counts: Int32s) -> NDArray[np.int64]:
    """Return begins[i], begins[i] + 1, ... of counts[i] numbers, for one i after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts) + np.repeat(begins, counts)
