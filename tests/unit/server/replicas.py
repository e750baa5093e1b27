"""Managers that only keep what they are sent, and requests for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from toka_engine.messages import Int32s, Submit
from toka_engine.server.replicas import Replicas
from toka_engine.slot_parameters import Sampling

BLOCK_TOKENS = 64


def prompt_of(num_tokens: int, first: int = 0) -> Int32s:
    return np.arange(first, first + num_tokens, dtype=np.int32)


def make_submit(first_stream: int = 0, n: int = 1, num_prompt: int = 10, max_tokens: int = 100) -> Submit:
    return Submit(first_stream, n, prompt_of(num_prompt), max_tokens, Sampling(), (), True)


class Managers:
    """`sent[i]`: what replica i was sent."""

    def __init__(self, num_replicas: int, max_blocks: int = 1000) -> None:
        self.sent: list[list[Any]] = [[] for _ in range(num_replicas)]
        senders: list[Callable[[Any], None]] = [sent.append for sent in self.sent]
        self.replicas = Replicas(senders, BLOCK_TOKENS)
        for replica in self.replicas.all:
            replica.prefixes.max_blocks = max_blocks

    @property
    def outstanding(self) -> list[int]:
        return [replica.outstanding for replica in self.replicas.all]

    @property
    def num_open(self) -> list[int]:
        return [replica.num_open for replica in self.replicas.all]
