"""Greedy answers of a soak, held against what the engine gives when it is left in peace.

Each answer is asked for again. Where the two part, the token that the soak gave must have been nearly as likely as the
other one; the rest is then asked for from there on (teacher forcing), so that one near tie is counted once.

Tokens are known by their labels, which several may share (a part of a character has no other than U+FFFD). Behind such
a label two answers may go on differently though all labels were equal, so where they part there, nobody knows why.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from toka_engine.benchmarks.soak_traffic import Greedy
from toka_engine.server.tokenization import Tokenizer

_NUM_TOP = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """A token that the soak gave and the check did not."""

    gap: float  # by how much it was less likely, in nats
    prompt: tuple[int, ...] = ()  # with the answer's tokens in front of it
    token: str = ""
    top: dict[str, float] = field(default_factory=dict)  # log-probabilities of the likeliest ones


@dataclass(slots=True)
class Agreement:
    """Over all answers."""

    num_tokens: int = 0
    num_unchecked: int = 0
    """Of answers that part from the check's behind a label that does not say which token it was."""
    differences: list[Difference] = field(default_factory=list)
    num_answers: int = 0

    @property
    def share(self) -> float:
        checked = self.num_tokens - self.num_unchecked
        return 1.0 - len(self.differences) / checked if checked else 1.0


class Labels:
    """Token ids by the label that logprobs give them, where only one token has it."""

    def __init__(self, tokenizer_dir: Path) -> None:
        tokenizer = Tokenizer(tokenizer_dir)
        self._ids: dict[str, int] = {}
        self.shared: set[str] = set()
        for token in range(len(tokenizer.bytes_of)):
            label = tokenizer.label_of(token).decode("utf-8", "replace")
            if self._ids.setdefault(label, token) != token:
                self.shared.add(label)

    def ids_of(self, labels: Sequence[str]) -> list[int] | None:
        """None if one of them could be several tokens, or is none."""
        if any(label in self.shared or label not in self._ids for label in labels):
            return None
        return [self._ids[label] for label in labels]


async def check_greedy(
    base_url: str, model: str, answers: Iterable[Greedy], labels: Labels, num_clients: int, seconds: float, seed: int
) -> Agreement:
    """Ask for the answers again, `num_clients` at a time, in an order by chance, as many as there are `seconds` for."""
    agreement, waiting = Agreement(), sorted(answers, key=lambda answer: (answer.prompt, answer.tokens))
    random.Random(seed).shuffle(waiting)
    until = time.monotonic() + seconds
    async with aiohttp.ClientSession(base_url, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def work() -> None:
            while waiting and time.monotonic() < until:
                await _check_one(session, model, waiting.pop(), labels, agreement)

        await asyncio.gather(*(work() for _ in range(num_clients)))
    return agreement


async def _check_one(
    session: aiohttp.ClientSession, model: str, answer: Greedy, labels: Labels, agreement: Agreement
) -> None:
    agreement.num_answers += 1
    agreement.num_tokens += len(answer.tokens)
    done = 0
    while done < len(answer.tokens):
        given = labels.ids_of(answer.tokens[:done])
        if given is None:
            agreement.num_unchecked += len(answer.tokens) - done
            return
        logprobs = await _ask(session, model, [*answer.prompt, *given], len(answer.tokens) - done)
        pairs = zip(answer.tokens[done:], logprobs["tokens"], strict=True)
        num_equal = next((at for at, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
        if num_equal is None:
            return
        equal = labels.ids_of(answer.tokens[done : done + num_equal])
        if equal is None:
            agreement.num_unchecked += len(answer.tokens) - done
            return
        token, top = answer.tokens[done + num_equal], logprobs["top_logprobs"][num_equal]
        gap = max(top.values()) - top.get(token, -math.inf)
        agreement.differences.append(Difference(gap, (*answer.prompt, *given, *equal), token, top))
        done += num_equal + 1


async def _ask(session: aiohttp.ClientSession, model: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": _NUM_TOP,
    }
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        found: dict[str, Any] = (await response.json())["choices"][0]["logprobs"]
        return found
