"""Tensors over device memory that something else keeps: named to torch by the CUDA array interface."""

from __future__ import annotations

import torch


def view_memory(address: int, size: int) -> torch.Tensor:
    """Return `size` bytes of the current device from `address` on as a flat uint8 tensor, which keeps nothing alive."""
    return torch.as_tensor(_Interface(address, size), device="cuda")


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same memory, shape and strides, which does not keep that memory alive."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = view_memory(tensor.data_ptr(), extent * tensor.element_size()).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


class _Interface:
    """Foreign device memory, as torch asks for it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
