"""The wire form of messages: msgpack by msgspec; numpy arrays as extension types that hold their raw bytes.

No pickle. Decoded arrays are read-only views of the received frame (no copy).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from toka_engine.errors import MessageError
from toka_engine.messages import NO_ITEMS

T = TypeVar("T")

_EXTENSION_OF_DTYPE: dict[np.dtype[Any], int] = {
    np.dtype(np.int32): 1,
    np.dtype(np.int64): 2,
    np.dtype(np.uint8): 3,
    np.dtype(np.float32): 4,
}
_DTYPE_OF_EXTENSION = {code: dtype for dtype, code in _EXTENSION_OF_DTYPE.items()}
_EMPTY = {code: msgspec.msgpack.Ext(code, b"") for code in _DTYPE_OF_EXTENSION}
"""Most arrays of most steps are empty, and neither sent nor received ones are made anew."""
_NO_ITEMS = {code: NO_ITEMS[dtype] for code, dtype in _DTYPE_OF_EXTENSION.items()}


def encode_array(value: Any) -> msgspec.msgpack.Ext:
    """Return an array in the wire form. Raises MessageError."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and (code := _EXTENSION_OF_DTYPE.get(value.dtype)):
        return msgspec.msgpack.Ext(code, np.ascontiguousarray(value).data.cast("B")) if value.size else _EMPTY[code]
    raise MessageError(f"cannot encode {type(value).__name__} of {getattr(value, 'dtype', '?')}")


def decode_array(code: int, data: memoryview) -> np.ndarray[Any, Any]:
    """Return the array of a wire form."""
    return np.frombuffer(data, _DTYPE_OF_EXTENSION[code]) if len(data) else _NO_ITEMS[code]


def accept_array(kind: Any, value: Any) -> Any:
    """Return `value`. Raises MessageError where it is no array."""
    if isinstance(value, np.ndarray):
        return value
    raise MessageError(f"expected an array for {kind}")


_encoder = msgspec.msgpack.Encoder(enc_hook=encode_array)


def encode(message: msgspec.Struct) -> bytes:
    """Return the frame body of `message`."""
    return _encoder.encode(message)


class Decoder(Generic[T]):
    """Decodes the frames of one link; `union` is the link's message type (a union of tagged structs)."""

    def __init__(self, union: Any) -> None:
        self._decode: Callable[[Any], T] = msgspec.msgpack.Decoder(
            union, ext_hook=decode_array, dec_hook=accept_array
        ).decode

    def decode(self, frame: bytes | bytearray | memoryview) -> T:
        """Return the message in `frame`. Raises MessageError."""
        try:
            return self._decode(frame)
        except (msgspec.DecodeError, KeyError, ValueError) as error:
            raise MessageError(f"bad frame: {error}") from error
