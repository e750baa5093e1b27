"""The use that is made of one API key: what it may use at once and in a minute, and what it has used.

Tokens are a bucket: it holds what a minute allows, fills evenly, and a request takes its tokens out of it, which may
leave a debt. A request is let in while the bucket is not empty. So a key may use its limit at once after a pause, and
over a long time uses no more than its limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from toka_engine.server.errors import ApiError
from toka_engine.server.keys.file import ApiKey

REQUESTS, TOKENS = "max_requests", "max_tokens_per_minute"
"""The limits, by the names that they have in the file."""
_Headers = tuple[tuple[bytes, bytes], ...]


class KeyUse:
    """A key that is in force. It stays the same object while the file has its name."""

    def __init__(self, entry: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        self.entry = entry
        self.num_running = 0
        """Requests that hold one of `max_requests` places, or would if there were a limit."""
        self.num_requests = 0
        """Requests that were answered, of any kind."""
        self.num_refused = {REQUESTS: 0, TOKENS: 0}
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._clock = clock
        self._level = float(entry.max_tokens_per_minute or 0)
        self._filled_at = clock()

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def owner(self) -> str:
        """Return whose files and batches the key's requests see. It has a form that no digest of a key has."""
        return f"key:{self.entry.owner or self.entry.name}"

    def change(self, entry: ApiKey) -> None:
        """Go on with other limits, or another key. What was used up stays used up."""
        self._fill()
        before, after = self.entry.max_tokens_per_minute, entry.max_tokens_per_minute
        self.entry = entry
        if after is not None:
            self._level = float(after) if before is None else min(self._level + after - before, float(after))

    def enter(self) -> None:
        """Take a place for a request that generates. Raises a 429 that names the limit."""
        if (limit := self.entry.max_requests) is not None and self.num_running >= limit:
            self.num_refused[REQUESTS] += 1
            raise _exceeded(self.name, REQUESTS, f"{limit} requests at once", 1)
        if (limit := self.entry.max_tokens_per_minute) is not None:
            self._fill()
            if self._level <= 0:
                self.num_refused[TOKENS] += 1
                raise _exceeded(self.name, TOKENS, f"{limit} tokens a minute", self._seconds_until_filled(limit))
        self.num_running += 1

    def leave(self) -> None:
        """Give the place back."""
        self.num_running -= 1

    def take(self, num_tokens: int) -> None:
        """Take tokens out of the bucket; negative ones are given back."""
        if (limit := self.entry.max_tokens_per_minute) is not None:
            self._fill()
            self._level = min(self._level - num_tokens, float(limit))

    def count(self, num_prompt: int, num_completion: int) -> None:
        """Count the tokens of an answer in the key's totals."""
        self.prompt_tokens += num_prompt
        self.completion_tokens += num_completion

    @property
    def tokens_left(self) -> int:
        """Return the tokens in the bucket; 0 without a limit, and while there is a debt."""
        self._fill()
        return max(0, math.floor(self._level))

    def _fill(self) -> None:
        now = self._clock()
        limit = self.entry.max_tokens_per_minute
        if limit is not None:
            self._level = min(float(limit), self._level + (now - self._filled_at) * limit / 60)
        self._filled_at = now

    def _seconds_until_filled(self, limit: int) -> int:
        """Return the whole seconds after which a request would be let in."""
        return max(1, math.floor(-self._level * 60 / limit) + 1)


def _exceeded(name: str, limit: str, words: str, seconds: int) -> ApiError:
    message = f"The API key '{name}' has reached its limit of {words} ({limit}). Try again in {seconds} s."
    headers: _Headers = ((b"retry-after", b"%d" % seconds), (b"x-toka-limit", limit.encode()))
    return ApiError(429, message, param=None, code="rate_limit_exceeded", headers=headers)
