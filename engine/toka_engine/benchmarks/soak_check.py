"""Greedy answers of a soak, held against what the engine gives when it is left in peace.

Each answer is asked for again. Where the two part, the token that the soak gave must have been nearly as likely as the
other one; the rest is then asked for from there on (teacher forcing), so that one near tie is counted once.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from toka_engine.benchmarks.soak_traffic import Greedy, read_token_ids

_NUM_TOP = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """A token that the soak gave and the check did not."""

    gap: float  # by how much it was less likely, in nats; infinite if it was none of the likeliest
    prompt: tuple[int, ...]  # with the answer's tokens in front of it
    token: int
    top: dict[int, float]  # log-probabilities of the likeliest ones

    def describe(self) -> dict[str, Any]:
        """For JSON, which has no infinite numbers, and in which a list of ids would take a line for each."""
        gap = round(self.gap, 4) if math.isfinite(self.gap) else None
        return {"gap": gap, "prompt": " ".join(map(str, self.prompt)), "token": self.token, "top": self.top}


@dataclass(slots=True)
class Agreement:
    """Over all answers."""

    num_tokens: int = 0
    differences: list[Difference] = field(default_factory=list)
    num_answers: int = 0

    @property
    def share(self) -> float:
        return 1.0 - len(self.differences) / self.num_tokens if self.num_tokens else 1.0

    def far(self, tie: float) -> list[Difference]:
        """Differences of more than `tie` nats, the farthest last."""
        return sorted((each for each in self.differences if each.gap > tie), key=lambda each: each.gap)


async def check_greedy(
    base_url: str, model: str, answers: Iterable[Greedy], num_clients: int, seconds: float, seed: int
) -> Agreement:
    """Ask for the answers again, `num_clients` at a time, in an order by chance, as many as there are `seconds` for."""
    agreement, waiting = Agreement(), sorted(answers, key=lambda answer: (answer.prompt, answer.tokens))
    random.Random(seed).shuffle(waiting)
    until = time.monotonic() + seconds
    async with aiohttp.ClientSession(base_url, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def work() -> None:
            while waiting and time.monotonic() < until:
                await _check_one(session, model, waiting.pop(), agreement)

        await asyncio.gather(*(work() for _ in range(num_clients)))
    return agreement


async def _check_one(session: aiohttp.ClientSession, model: str, answer: Greedy, agreement: Agreement) -> None:
    agreement.num_answers += 1
    agreement.num_tokens += len(answer.tokens)
    done = 0
    while done < len(answer.tokens):
        prompt = (*answer.prompt, *answer.tokens[:done])
        logprobs = await _ask(session, model, prompt, len(answer.tokens) - done)
        pairs = zip(answer.tokens[done:], read_token_ids(logprobs["tokens"]), strict=True)
        num_equal = next((at for at, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
        if num_equal is None:
            return
        done += num_equal
        names = logprobs["top_logprobs"][num_equal]
        top = dict(zip(read_token_ids(list(names)), names.values(), strict=True))
        gap = max(top.values()) - top.get(answer.tokens[done], -math.inf)
        before = (*answer.prompt, *answer.tokens[:done])
        agreement.differences.append(Difference(gap, before, answer.tokens[done], top))
        done += 1


async def _ask(session: aiohttp.ClientSession, model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": _NUM_TOP,
        "return_tokens_as_token_ids": True,
    }
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        found: dict[str, Any] = (await response.json())["choices"][0]["logprobs"]
        return found
