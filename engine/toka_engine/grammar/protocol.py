"""The messages between the server and a grammar checker's process. Loads no grammar library: the server has none."""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

LENGTH = struct.Struct("<I")
"""Each message is its length in bytes, and that many bytes of msgpack."""


class Setup(msgspec.Struct, frozen=True):
    """First message to the process: the model's tokens."""

    tokenizer_dir: str
    vocab_size: int
    end_ids: tuple[int, ...]


class Verdict(msgspec.Struct, frozen=True):
    """The answer to one source. The first one, to `Setup`, says that the process is ready."""

    error: str = ""
    """Says why the source cannot be used; "": it can."""
    dropped: list[str] = []
    """Keywords of a lenient source that are not enforced."""
    failure: Literal["", "too_much", "starved"] = ""
    """The source took too much time or memory; or got too little of the CPU to say so."""
