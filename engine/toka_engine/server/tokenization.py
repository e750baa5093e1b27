"""Encodes text to token ids and decodes ids to bytes, by a model folder's tokenizer.json. Never loads torch or
transformers.

Owns: the tokenizer, its thread pool, and the table of each token's bytes. Texts are encoded with the interpreter lock
released (encode_batch_fast), long ones in the pool, so that other requests go on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers

from toka_engine.errors import ModelInvalidError
from toka_engine.messages import Int32s

_INLINE_CHARACTERS = 1024
"""Shorter texts take less time to encode than a thread takes to answer."""
_POOL_THREADS = 2
_SPACE = "\u2581"
"""The character that SentencePiece vocabularies write for a space."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []
    decoder: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None


class Tokenizer:
    """The tokenizer of one model folder. Encoding is thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer. Raises ModelInvalidError where tokenizer.json is missing or cannot be used."""
        path = folder / "tokenizer.json"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool is ours
        try:
            data = path.read_bytes()
            layout = msgspec.json.decode(data, type=_TokenizerFile)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except FileNotFoundError as error:
            raise ModelInvalidError(f"{path} is missing") from error
        except Exception as error:  # tokenizers raises plain Exception for every defect of the file
            raise ModelInvalidError(f"{path} cannot be used: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_texts = tuple(token.content for token in layout.added_tokens if token.special)
        self._specials = {token.id: token.content.encode() for token in layout.added_tokens if token.special}
        self.bytes_of = _byte_table(self._tokenizer, layout, path)
        self._bytes_with_specials: list[bytes] = []
        self._longest_token_bytes = max(map(len, self.bytes_of)) * (1 if layout.normalizer is None else 4)
        self._pool = ThreadPoolExecutor(_POOL_THREADS, "tokenize")

    def cover(self, vocab_size: int) -> None:
        """Extend the byte table to the model's vocabulary, which may be padded beyond the tokenizer's."""
        self.bytes_of.extend([b""] * (vocab_size - len(self.bytes_of)))

    @property
    def bytes_with_specials(self) -> Sequence[bytes]:
        """The byte table in which special tokens have their names as text."""
        if len(self._bytes_with_specials) < len(self.bytes_of):
            self._bytes_with_specials = [self.label_of(token) for token in range(len(self.bytes_of))]
        return self._bytes_with_specials

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def label_of(self, token: int) -> bytes:
        """Return the bytes by which logprobs name `token`; for a special token its name."""
        return self.bytes_of[token] or self._specials.get(token, b"")

    def bytes_with(self, texts: Collection[str]) -> list[bytes]:
        """Return `bytes_of` in which those special tokens that `texts` names have their text's bytes."""
        shown = {token: text for token, text in self._specials.items() if text.decode() in texts}
        if not shown:
            return self.bytes_of
        table = self.bytes_of.copy()
        for token, text in shown.items():
            table[token] = text
        return table

    def find_special(self, texts: Collection[str]) -> dict[str, int]:
        """Return the ids of those of `texts` that are special tokens."""
        return {text.decode(): token for token, text in self._specials.items() if text.decode() in texts}

    def max_text_bytes(self, num_tokens: int) -> int:
        """Return the bytes beyond which no text fits in `num_tokens`, so that it need not be encoded to be refused."""
        return num_tokens * self._longest_token_bytes

    def encode(
        self, texts: list[str], *, add_special_tokens: bool, check: Callable[[Int32s], None] | None = None
    ) -> list[Int32s]:
        """Return the ids of each text; special tokens that are written out in it are taken as such.

        `check` sees the ids of each text as soon as they are there, and may end the work by raising.
        """
        found: list[Int32s] = []
        for text in texts:
            # One at a time: an encoding holds a hundred bytes and more per token until its ids are taken out.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            found.append(np.array(encoding.ids, np.int32))
            if check:
                check(found[-1])
        return found

    def encode_word(self, text: str) -> list[int]:
        """Return the ids of `text` within another text."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    async def encode_aside(
        self, texts: list[str], *, add_special_tokens: bool, check: Callable[[Int32s], None]
    ) -> list[Int32s]:
        """Encode as `encode` does, long texts in the thread pool, where `check` is called then."""
        work = partial(self.encode, texts, add_special_tokens=add_special_tokens, check=check)
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def text_of(self, ids: Int32s) -> str:
        """Return the text of a whole output; special tokens have none, broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.bytes_of.__getitem__, ids.tolist())).decode("utf-8", "replace")


def _byte_table(tokenizer: tokenizers.Tokenizer, layout: _TokenizerFile, path: Path) -> list[bytes]:
    """Return, by id, the bytes that each token adds to the text; b"" for special tokens and unused ids."""
    to_bytes = _token_to_bytes(layout.decoder, path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        table[token_id] = to_bytes(token)
    for added in layout.added_tokens:
        table[added.id] = b"" if added.special else added.content.encode()
    return table


def _token_to_bytes(decoder: dict[str, Any] | None, path: Path) -> Any:
    parts = (decoder.get("decoders") or [decoder]) if decoder else []
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        byte_of = _byte_of_character()
        return lambda token: _byte_level(token, byte_of)
    if kinds & {"Metaspace", "ByteFallback"}:
        return _sentencepiece
    raise ModelInvalidError(f"{path}: decoder {sorted(map(str, kinds))} is not supported")


def _byte_level(token: str, byte_of: dict[int, int]) -> bytes:
    if all(ord(character) in byte_of for character in token):
        return token.translate(byte_of).encode("latin-1")
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_SPACE, " ").encode()


def _byte_of_character() -> dict[int, int]:
    """Return GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(others)}
