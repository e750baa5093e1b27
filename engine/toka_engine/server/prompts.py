"""Encodes a request's prompt or messages to token ids: limits are checked first, then text, then ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from toka_engine.messages import Int32s
from toka_engine.server.chat_template import NO_VARIABLES, ChatTemplate, Turn
from toka_engine.server.connection import Connection
from toka_engine.server.errors import ClientGoneError
from toka_engine.server.limits import Limits
from toka_engine.server.reading import read_prompt
from toka_engine.server.tokenization import Tokenizer


class PromptEncoder:
    """Encodes the prompts of one request."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, connection: Connection) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._connection = connection

    async def encode_prompt(self, prompt: msgspec.Raw, *, with_text: bool) -> tuple[list[Int32s], list[str]]:
        """Return the ids of each prompt, and with `with_text` its text. Raises a 400."""
        checked = await read_prompt(prompt, self._limits, self._connection)
        texts = [part for part in checked if isinstance(part, str)]
        prompts = [part for part in checked if not isinstance(part, str)]
        if texts:
            for text in texts:
                self._check_size("prompt", [text])
            prompts = await self._tokenizer.encode_aside(
                texts, add_special_tokens=True, check=partial(self._check_ids, "prompt")
            )
        elif with_text:
            texts = [self._tokenizer.text_of(ids) for ids in prompts]
        return prompts, texts if with_text else []

    async def encode_chat(
        self, turns: Sequence[Turn], template: ChatTemplate, variables: Mapping[str, Any] = NO_VARIABLES
    ) -> tuple[Int32s, str]:
        """Return the ids of the rendered conversation, and the last part of its text. Raises a 400."""
        self._check_size("messages", [turn["content"] for turn in turns])
        parts = template.render(turns, variables)
        encoded = await self._tokenizer.encode_aside(
            parts, add_special_tokens=False, check=partial(self._check_ids, "messages")
        )
        ids = encoded[0] if len(encoded) == 1 else np.concatenate([*encoded, np.empty(0, np.int32)])
        return ids, parts[-1] if parts else ""

    def _check_size(self, param: str, texts: Sequence[str]) -> None:
        """Refuse what cannot fit into one prompt before it is encoded."""
        most = self._tokenizer.max_text_bytes(self._limits.max_request_tokens)
        if sum(map(len, texts)) * 4 > most:  # a character has at most four bytes
            self._limits.check_text_size(param, sum(len(text.encode()) for text in texts), most)

    def _check_ids(self, param: str, ids: Int32s) -> None:
        """End the work at the first text that is too long, and when nobody waits for it any more."""
        if len(ids) >= self._limits.max_request_tokens:
            raise self._limits.too_long(param, len(ids))
        if self._connection.is_gone:
            raise ClientGoneError("the client closed the connection")
