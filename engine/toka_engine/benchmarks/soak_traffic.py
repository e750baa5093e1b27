"""The soak's traffic: random requests of every size and kind, some of which leave early, and what came of them.

Knows the API alone. A promise that an answer breaks (its status, its number of tokens, its end) goes into
`Traffic.broken`; the greedy answers are kept for `soak_check`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_FIRST_TOKEN_ID = 300
_LEAVE_RATE = 0.15
_LONGEST_STAY_S = 4.0
_STOPS = ["a", "e", "t"]
_PATIENCE_S = 10.0
_KEPT_BROKEN = 20
_KINDS = {"short": 10, "choices": 5, "many": 1, "batch": 1, "longest": 1, "growing": 3, "stopping": 4}
"""Kind -> how often it comes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's own figures in /metrics, and the vocabulary that prompts are made of."""

    max_request_tokens: int
    max_streams: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Greedy:
    """The answer to one greedy request."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(slots=True)
class Traffic:
    """Live counts of one soak."""

    base_url: str
    model: str
    limits: Limits
    source: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    greedy: set[Greedy] = field(default_factory=set)
    _prefixes: list[list[int]] = field(default_factory=list)
    _end_s: float = 0.0

    async def run(self, seconds: float, num_clients: int) -> None:
        """Keep `num_clients` requests going for `seconds`, then leave those that are not soon answered.

        All begin with as many sequences as one may ask for: chance would bring such peaks later, and the memory that a
        process takes for them would look like a leak.
        """
        self._prefixes = [self._tokens(length) for length in (40, 170, 700) if length < self.limits.max_request_tokens]
        until = time.monotonic() + seconds
        self._end_s = until + _PATIENCE_S
        timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.base_url, timeout=timeout, connector=connector) as session:

            async def keep_asking() -> None:
                await self._send(session, self._make_body("batch"))
                while time.monotonic() < until:
                    await self._send(session, self._make_body())

            await asyncio.gather(*(keep_asking() for _ in range(num_clients)))

    def _tokens(self, count: int) -> list[int]:
        return [self.source.randrange(_FIRST_TOKEN_ID, self.limits.vocab_size) for _ in range(count)]

    def _make_body(self, kind: str | None = None) -> dict[str, Any]:
        """A random request, of a random kind if none is given: how long, how many choices, how drawn, how delivered."""
        source, longest = self.source, self.limits.max_request_tokens
        kind = kind or source.choices(list(_KINDS), list(_KINDS.values()))[0]
        self.counts[kind] += 1
        own, max_tokens, num_choices = source.randint(1, 48), source.randint(1, 48), 1
        match kind:
            case "choices":
                num_choices, max_tokens = source.choice([2, 3, 5, 8, 16, 32]), source.randint(1, 32)
            case "many":
                num_choices, max_tokens = source.choice([64, 128, 256, 512]), source.randint(1, 8)
            case "batch":  # as many sequences at once as the engine runs
                num_choices, max_tokens = min(1024, self.limits.max_streams), source.randint(1, 4)
            case "longest":
                max_tokens = source.randint(1, 8)
                own = longest - max_tokens
            case "growing":
                num_choices, max_tokens = source.choice([1, 4, 16]), source.randint(longest // 64 + 1, longest // 8)
            case "stopping":
                num_choices = source.choice([1, 4, 16])
        prefix = source.choice(self._prefixes) if source.random() < 0.4 else []
        prompt = (prefix + self._tokens(own))[: max(1, longest - max_tokens)]
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "n": num_choices, "ignore_eos": True}
        body |= self._make_sampling()
        if kind == "stopping":  # ends early, so that the scheduler bets on it; where the bet is lost, it preempts
            body |= {"stop": _STOPS, "temperature": 1.0, "max_tokens": max(1, longest - len(prompt))}
        if source.random() < 0.4:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def _make_sampling(self) -> dict[str, Any]:
        source = self.source
        if source.random() < 0.3:
            return {"temperature": 0, "logprobs": 0, "return_tokens_as_token_ids": True}
        fields: dict[str, Any] = {"temperature": source.choice([0.3, 1.0, 1.7])}
        for name, value in (
            ("seed", source.getrandbits(40)),
            ("top_p", 0.9),
            ("top_k", 50),
            ("min_p", 0.05),
            ("frequency_penalty", 0.5),
            ("presence_penalty", -0.5),
            ("repetition_penalty", 1.2),
            ("logprobs", 3),
        ):
            if source.random() < 0.2:
                fields[name] = value
        return fields

    async def _send(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        rest_s = self._end_s - time.monotonic()
        stay_s = self.source.uniform(0.0, _LONGEST_STAY_S) if self.source.random() < _LEAVE_RATE else rest_s
        try:
            async with asyncio.timeout(min(stay_s, rest_s)), session.post("/v1/completions", json=body) as response:
                if response.status == 429:
                    self.counts["refused"] += 1
                    return
                if response.status != 200:
                    self._break(f"status {response.status}: {(await response.text())[:200]}")
                    return
                answer = await (_read_events(response) if body.get("stream") else response.json())
        except TimeoutError:
            self.counts["left"] += 1
            return
        except (aiohttp.ClientError, ValueError) as error:
            self._break(f"{type(error).__name__}: {error}")
            return
        self.counts["answered"] += 1
        self._judge(body, answer)

    def _judge(self, body: dict[str, Any], answer: dict[str, Any]) -> None:
        if "stop" in body:
            return
        wanted = body["max_tokens"] * body["n"]
        usage = answer["usage"] or {}
        self.counts["output_tokens"] += wanted
        if usage.get("completion_tokens") != wanted or usage.get("prompt_tokens") != len(body["prompt"]):
            self._break(f"usage {usage} of {len(body['prompt'])} + {wanted} tokens")
        if [choice["finish_reason"] for choice in answer["choices"]] != ["length"] * body["n"]:
            self._break(f"{len(answer['choices'])} choices of {body['n']}, or one that did not end by its length")
        if body["temperature"] == 0:
            for choice in answer["choices"]:
                tokens = tuple(read_token_ids(choice["logprobs"]["tokens"]))
                if len(tokens) != body["max_tokens"]:
                    self._break(f"{len(tokens)} logprobs of {body['max_tokens']} tokens")
                self.greedy.add(Greedy(tuple(body["prompt"]), tokens))

    def _break(self, what: str) -> None:
        self.counts["broken"] += 1
        if len(self.broken) < _KEPT_BROKEN:
            self.broken.append(what)


def read_token_ids(names: list[str]) -> list[int]:
    """Read the ids of tokens as `return_tokens_as_token_ids` names them."""
    return [int(name.removeprefix("token_id:")) for name in names]


async def _read_events(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Server-sent events put together as the whole answer would be. Raises ValueError without a proper end."""
    choices: dict[int, dict[str, Any]] = {}
    usage: dict[str, int] | None = None
    is_done = False
    async for line in response.content:
        data = line.removeprefix(b"data: ").strip()
        if not data:
            continue
        if data == b"[DONE]":
            is_done = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise ValueError(f"an error ends the stream: {event['error']}")
        usage = event.get("usage") or usage
        for piece in event["choices"]:
            whole = choices.setdefault(piece["index"], {"finish_reason": None, "logprobs": {"tokens": []}})
            whole["finish_reason"] = piece["finish_reason"] or whole["finish_reason"]
            whole["logprobs"]["tokens"] += (piece["logprobs"] or {}).get("tokens", [])
    if not is_done:
        raise ValueError("a stream without [DONE]")
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}
