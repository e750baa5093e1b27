"""Decodes a request's `prompt` from raw JSON to texts or token ids, in slices between which other requests run.

Owns: the forms that a prompt may have. The body's decoder skips the prompt, which may have megabytes. Too many ids or
prompts are counted in the raw bytes and refused undecoded. Other prompts are decoded one at a time, on the event loop,
which gets its turn after each slice. Not in a thread: the JSON decoder holds the interpreter lock, so that a thread
would block the loop for as long.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Protocol

import msgspec

from toka_engine.messages import Int32s
from toka_engine.server.decoding import decode_part
from toka_engine.server.errors import ClientGoneError, invalid
from toka_engine.server.limits import Limits

_SLICE_BYTES = 64 * 1024
"""The size of a slice: about a millisecond of decoding and checking."""
_LIST_START = re.compile(rb"\[\s*(.)", re.DOTALL)
_decode_text = msgspec.json.Decoder(str).decode
_decode_ids = msgspec.json.Decoder(list[int]).decode
_decode_parts = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Asker(Protocol):
    """A client that waits for an answer."""

    is_gone: bool


async def read_prompt(
    raw: msgspec.Raw, limits: Limits, asker: Asker, *, is_truncated: bool = False
) -> list[str] | list[Int32s]:
    """Return the texts to encode, or the prompts as ids, checked. Raises a 400 that names the field. `is_truncated`:
    ids may be more than fit.
    """
    data = bytes(raw)
    if data.startswith(b'"'):
        return limits.check_texts([decode_part(_decode_text, raw, "prompt")])
    start = _LIST_START.match(data)
    if start is None:
        raise invalid("prompt", "'prompt' must be a text, token ids, or a list of either.", "invalid_type")
    match start[1]:
        case b"]":
            raise invalid("prompt", "'prompt' is empty.")
        case b'"':
            # A quote behind a backslash may be part of a text: there are at least so many texts.
            limits.check_num_prompts((data.count(b'"') - data.count(b'\\"')) // 2)
            return limits.check_texts(await _read_each(raw, _decode_text, asker))
        case b"[":
            limits.check_num_prompts(data.count(b"[") - 1)
            return await _read_each(raw, _decode_ids, asker, limits, is_truncated=is_truncated)
        case _:
            limits.check_num_ids(data.count(b",") + 1, is_truncated=is_truncated)
            ids = decode_part(_decode_ids, raw, "prompt")
            return [limits.check_ids(ids, "prompt", is_truncated=is_truncated)]


async def _read_each(
    raw: msgspec.Raw, decode: Any, asker: Asker, limits: Limits | None = None, *, is_truncated: bool = False
) -> list[Any]:
    """Decode each prompt by itself; with `limits` they are ids, checked at once."""
    found: list[Any] = []
    num_bytes = 0
    for index, part in enumerate(decode_part(_decode_parts, raw, "prompt")):
        name = f"prompt[{index}]"
        size = memoryview(part).nbytes
        if limits is not None and size // 2 >= limits.max_request_tokens:
            limits.check_num_ids(bytes(part).count(b",") + 1, is_truncated=is_truncated)
        value = decode_part(decode, part, name)
        found.append(value if limits is None else limits.check_ids(value, name, is_truncated=is_truncated))
        num_bytes += size
        if num_bytes >= _SLICE_BYTES:
            num_bytes = 0
            await asyncio.sleep(0)
            if asker.is_gone:
                raise ClientGoneError("the client closed the connection")
    return found
