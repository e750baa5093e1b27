"""The four functions of NCCL that a host without peer memory needs, by ctypes.

torch's process groups would bring a listener and a watchdog, and its own binding cannot connect processes in the
version that we use. The library is the one that torch has loaded.
"""

from __future__ import annotations

import ctypes

import torch

_ID_BYTES = 128
_INT8 = 0
"""NCCL's number of the type: what is gathered is bytes to it."""


class NcclError(Exception):
    """A call of NCCL failed; the message says which one and why."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _ID_BYTES),)


class Nccl:
    """The library, and a communicator of it once `connect` has been called."""

    def __init__(self) -> None:
        """Raises NcclError where there is no library."""
        try:
            self._library = ctypes.CDLL("libnccl.so.2")
        except OSError as error:
            raise NcclError(str(error)) from error
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        self._library.ncclCommInitRank.argtypes = (ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int)
        self._library.ncclAllGather.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
        )
        self._communicator = ctypes.c_void_p()

    def make_id(self) -> bytes:
        """Return the bytes by which ranks find each other; for the first rank to make, and all to get."""
        made = _UniqueId()
        self._check("ncclGetUniqueId", self._library.ncclGetUniqueId(ctypes.byref(made)))
        return bytes(made)

    def connect(self, unique_id: bytes, rank: int, size: int) -> None:
        """Connect the ranks, each on its current device. Waits for all of them."""
        made = _UniqueId.from_buffer_copy(unique_id)
        code = self._library.ncclCommInitRank(ctypes.byref(self._communicator), size, made, rank)
        self._check("ncclCommInitRank", code)

    def all_gather(self, x: torch.Tensor, parts: torch.Tensor) -> None:
        """Gather contiguous `x` of every rank into contiguous `parts`, in rank order, in the current stream."""
        code = self._library.ncclAllGather(
            x.data_ptr(),
            parts.data_ptr(),
            x.numel() * x.itemsize,
            _INT8,
            self._communicator,
            torch.cuda.current_stream().cuda_stream,
        )
        self._check("ncclAllGather", code)

    def _check(self, name: str, code: int) -> None:
        if code:
            raise NcclError(f"{name} failed: {self._library.ncclGetErrorString(code).decode()}")
