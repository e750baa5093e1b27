"""Encodes a request's prompt or messages to token ids: limits are checked first, then text, then ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from toka_engine.messages import Int32s
from toka_engine.server.chat_template import NO_VARIABLES, ChatTemplate, Turn
from toka_engine.server.errors import ClientGoneError
from toka_engine.server.limits import Limits
from toka_engine.server.reading import Asker, read_prompt
from toka_engine.server.tokenization import Tokenizer


class PromptEncoder:
    """Encodes the prompts of one request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        asker: Asker,
        *,
        adds_special_tokens: bool | None = None,
        truncation: int | None = None,
        is_bounded: bool = True,
    ) -> None:
        """`adds_special_tokens` None: to prompts and not to rendered messages; `truncation`: how many of the last
        tokens of each prompt are kept; `is_bounded`: prompts must fit into the engine's context.
        """
        self._tokenizer = tokenizer
        self._limits = limits
        self._asker = asker
        self._adds_special_tokens = adds_special_tokens
        self._truncation = truncation
        self._refuses_long = is_bounded and truncation is None

    async def read_prompt(self, prompt: msgspec.Raw) -> tuple[list[str], list[Int32s]]:
        """Return the texts of the prompts, or their ids, each checked by itself. Raises a 400."""
        checked = await read_prompt(prompt, self._limits, self._asker, is_truncated=self._truncation is not None)
        texts = [part for part in checked if isinstance(part, str)]
        return texts, [part for part in checked if not isinstance(part, str)]

    async def encode_prompt(
        self, texts: list[str], prompts: list[Int32s], *, with_text: bool
    ) -> tuple[list[Int32s], list[str]]:
        """Return the ids of each prompt that was read, and with `with_text` its text. Raises a 400."""
        truncation = self._truncation
        if texts:
            prompts = await self._encode(texts, "prompt", adds_special_tokens=self._adds_special_tokens is not False)
        if truncation is not None:
            prompts = [ids[-truncation:] for ids in prompts]
        if not with_text:
            return prompts, []
        if truncation is not None or not texts:
            texts = [self._tokenizer.text_of(ids) for ids in prompts]
        return prompts, texts

    async def encode_text(self, text: str) -> Int32s:
        """Return the ids of one text, which may be empty. Raises a 400."""
        (ids,) = await self._encode([text], "prompt", adds_special_tokens=self._adds_special_tokens is not False)
        return ids

    async def encode_chat(
        self,
        turns: Sequence[Turn],
        template: ChatTemplate,
        variables: Mapping[str, Any] = NO_VARIABLES,
        *,
        continues_final: bool = False,
    ) -> tuple[Int32s, str]:
        """Return the ids of the rendered conversation, and the last part of its text. Raises a 400."""
        if self._truncation is None:
            self._check_size("messages", [turn["content"] for turn in turns])
        parts = template.render(turns, variables, continues_final=continues_final)
        encoded = await self._encode(parts[:1], "messages", adds_special_tokens=bool(self._adds_special_tokens))
        encoded += await self._encode(parts[1:], "messages", adds_special_tokens=False)
        ids = encoded[0] if len(encoded) == 1 else np.concatenate([*encoded, np.empty(0, np.int32)])
        if self._truncation is not None:
            ids = ids[-self._truncation :]
        return ids, parts[-1] if parts else ""

    async def _encode(self, texts: list[str], param: str, *, adds_special_tokens: bool) -> list[Int32s]:
        if self._truncation is not None:
            # A text is cut where more tokens than are kept follow for certain, with room for one that is cut in two.
            most = self._tokenizer.max_text_bytes(self._truncation + 16)
            texts = [text[-most:] for text in texts]
        elif param == "prompt":
            for text in texts:
                self._check_size(param, [text])
        return await self._tokenizer.encode_aside(
            texts, add_special_tokens=adds_special_tokens, check=partial(self._check_ids, param)
        )

    def _check_size(self, param: str, texts: Sequence[str]) -> None:
        """Refuse what cannot fit into one prompt before it is encoded."""
        most = self._tokenizer.max_text_bytes(self._limits.max_request_tokens)
        if sum(map(len, texts)) * 4 > most:  # a character has at most four bytes
            self._limits.check_text_size(param, sum(len(text.encode()) for text in texts), most)

    def _check_ids(self, param: str, ids: Int32s) -> None:
        """End the work at the first text that is too long, and when nobody waits for it any more."""
        if self._refuses_long and len(ids) >= self._limits.max_request_tokens:
            raise self._limits.too_long(param, len(ids))
        if self._asker.is_gone:
            raise ClientGoneError("the client closed the connection")
