"""Top logprobs of output tokens that are delivered when their stream ends, stored by the token's index in the pages.

The j-th likeliest tokens of all places lie in one row, and np.zeros takes memory only where it is written: engines
that nobody asks for top logprobs hold none, and nobody holds more ranks than were asked for.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from toka_engine.messages import Floats, Int32s

Tops: TypeAlias = NDArray[np.int64]
"""The k likeliest tokens at n places: [n, k], each a token's id and logprob in one number (numpy gathers these faster
than two tables, and much faster than fields)."""

Indices: TypeAlias = NDArray[np.signedinteger[Any]]

_PAIR = np.dtype([("token", np.int32), ("logprob", np.float32)])


def pack(tokens: Int32s, logprobs: Floats, width: int) -> Tops:
    """`tokens` and `logprobs` are [n * width], as messages have them."""
    pairs = np.empty((tokens.size // width, width), _PAIR)
    pairs["token"], pairs["logprob"] = tokens.reshape(-1, width), logprobs.reshape(-1, width)
    return pairs.view(np.int64)


def unpack(tops: Tops) -> tuple[Int32s, Floats]:
    """Return tops in the form that `pack` takes."""
    pairs = np.ascontiguousarray(tops).reshape(-1).view(_PAIR)
    return pairs["token"], pairs["logprob"]


NO_TOP = pack(np.asarray([-1], np.int32), np.asarray([np.nan], np.float32), 1)[0, 0]
"""The entry of tokens for which fewer were asked."""


class TopLogprobs:
    """A place is page * page_size + offset. The newest token of a slot may have none yet."""

    def __init__(self, num_places: int, num_slots: int, most: int) -> None:
        self._at_places = np.zeros((most, num_places), np.int64)
        self._newest = np.zeros((most, num_slots), np.int64)
        self.is_used = False
        """Anything has been stored."""

    def store(self, slots: Int32s, places: Int32s, tops: Tops) -> None:
        """`tops` of the newest tokens of `slots`, which lie at `places`; -1: their pages do not exist yet."""
        self.is_used = True
        width, has_place = tops.shape[1], places >= 0
        self._at_places[:width, places[has_place]] = tops[has_place].T
        self._newest[:width, slots[~has_place]] = tops[~has_place].T

    def place_newest(self, slots: Int32s, places: Int32s, width: int) -> None:
        """The pages of the newest tokens of `slots` exist now."""
        self._at_places[:width, places] = self._newest[:width, slots]

    def at_places(self, places: Indices, width: int) -> Tops:
        """The `width` likeliest tokens of each place."""
        return self._at_places[:width, places].T

    def newest(self, slots: Indices, width: int) -> Tops:
        """The `width` likeliest tokens in place of each newest one."""
        return self._newest[:width, slots].T
