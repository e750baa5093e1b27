"""The workloads of the throughput benchmark: token-id prompts whose number of output tokens is known. Pure.

A workload is written NAME or NAME:KEY=VALUE,KEY=VALUE. Keys: N requests (monkeys: P prompts of n samples), C of them
open at once, PL and OL tokens of each prompt and output, T the temperature, top_p, top_k, min_p, seed. Names:
  single    one request at a time                       N=3 PL=128 OL=256
  prefill   prompts with one token of output each       N=512 PL=2048 C=4096
  chat      streamed: first token, gaps between tokens  N=1024 C=256 PL=512 OL=256
  monkeys   many samples of few prompts, three quarters of which all share   P=32 n=256 PL=1024 OL=200 C=4096
  sharegpt  log-normal lengths, about 220 tokens in and 200 out, at most 1,024 each   N=8192 C=8192
Every request ignores the end token. A seed makes the same prompts each time, another seed shares nothing with them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from toka_engine.benchmarks.roofline import Sizes
from toka_engine.errors import ConfigError

_FIRST_TOKEN_ID = 300
_MAX_SHAREGPT = 1024

_DEFAULTS: dict[str, dict[str, float]] = {
    "single": {"N": 3, "PL": 128, "OL": 256},
    "prefill": {"N": 512, "PL": 2048, "C": 4096},
    "chat": {"N": 1024, "C": 256, "PL": 512, "OL": 256},
    "monkeys": {"P": 32, "n": 256, "PL": 1024, "OL": 200, "C": 4096},
    "sharegpt": {"N": 8192, "C": 8192},
}
NAMES = tuple(_DEFAULTS)
_SAMPLING = {"T": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed"}
"""Keys that every workload takes, and the request's field that each sets."""
_REALS = {"T": 100.0, "top_p": 1.0, "min_p": 1.0}
"""Keys of real numbers from 0, and up to what; the other keys' numbers are whole."""
_COUNTS = ("N", "P")
"""The keys that `scale` multiplies."""
_MIN_MONKEYS_PROMPT = 4


class WorkloadError(ConfigError):
    """No such workload, or no such key of one; the message names it."""


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    max_tokens: int
    num_choices: int = 1

    @property
    def num_output_tokens(self) -> int:
        return self.max_tokens * self.num_choices


@dataclass(frozen=True, slots=True)
class Workload:
    requests: list[Request]
    concurrency: int
    is_streamed: bool = False
    num_shared: int = 0
    """First tokens that all prompts have in common."""
    sampling: dict[str, float] = field(default_factory=dict)
    """Fields of every request: temperature, top_p, ..."""

    def part(self, index: int, count: int) -> Workload:
        """Return the share of client `index` of `count`."""
        concurrency = self.concurrency // count + (index < self.concurrency % count)
        return Workload(self.requests[index::count], concurrency, self.is_streamed, self.num_shared, self.sampling)

    def sizes(self) -> list[Sizes]:
        return [Sizes(len(each.prompt), each.max_tokens, each.num_choices) for each in self.requests]


def first_token_id(vocab_size: int) -> int:
    """The smallest id in a prompt: behind the special tokens of most vocabularies."""
    return min(_FIRST_TOKEN_ID, vocab_size // 2)


def make_workload(text: str, scale: float, seed: int, vocab_size: int) -> Workload:
    """The workload that `text` names, with `scale` times as many requests. Raises WorkloadError."""
    name, values = _read(text, scale)
    source = random.Random(seed)
    first = first_token_id(vocab_size)

    def tokens(count: int) -> list[int]:
        return [source.randrange(first, vocab_size) for _ in range(count)]

    def length(mean: float, deviation: float) -> int:
        return max(4, min(_MAX_SHAREGPT, int(source.lognormvariate(mean, deviation))))

    count, prompt, output = (int(values.get(key, 1)) for key in ("N", "PL", "OL"))
    concurrency, num_shared = int(values.get("C", 1)), 0
    if name == "monkeys":
        num_shared = prompt * 3 // 4
        shared = tokens(num_shared)
        requests = [
            Request(shared + tokens(prompt - num_shared), output, int(values["n"])) for _ in range(int(values["P"]))
        ]
    elif name == "sharegpt":
        requests = [Request(tokens(length(4.6, 1.2)), length(4.9, 0.9)) for _ in range(count)]
    else:
        requests = [Request(tokens(prompt), output) for _ in range(count)]
    sampling = {"temperature": 1.0} | {asked: values[key] for key, asked in _SAMPLING.items() if key in values}
    return Workload(requests, concurrency, name == "chat", num_shared, sampling)


def _read(text: str, scale: float) -> tuple[str, dict[str, float]]:
    name, _, rest = text.partition(":")
    if name not in _DEFAULTS:
        raise WorkloadError(f"unknown workload {name!r} ({', '.join(NAMES)} are known)")
    values = dict(_DEFAULTS[name])
    for pair in rest.split(",") if rest else ():
        key, _, number = pair.partition("=")
        if key not in values and key not in _SAMPLING:
            raise WorkloadError(f"{text}: {name} has no key {key!r} ({', '.join([*values, *_SAMPLING])} it has)")
        values[key] = _read_number(text, key, number)
    for key in _COUNTS:
        if key in values:
            values[key] = max(1, int(values[key] * scale))
    if name == "monkeys" and values["PL"] < _MIN_MONKEYS_PROMPT:
        raise WorkloadError(f"{text}: PL must be at least {_MIN_MONKEYS_PROMPT}")
    return name, values


def _read_number(text: str, key: str, number: str) -> float:
    try:
        value = float(number) if key in _REALS else int(number)
    except ValueError as error:
        raise WorkloadError(f"{text}: {key}={number!r} is not a number") from error
    if not (0 <= value <= _REALS[key] if key in _REALS else value >= (key != "seed")):
        raise WorkloadError(f"{text}: {key}={number} is out of range")
    return value
