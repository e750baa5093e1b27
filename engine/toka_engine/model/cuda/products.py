"""Loads the GEMM kernels of a model's linear layers at the start, so that none is loaded beside running steps.

cuBLAS chooses a kernel by the number of rows, and CUDA loads it when it is launched first. That takes milliseconds, and
it waits for the steps on the device, so that the gaps between the tokens of all streams grow by whole steps. A layer of
each shape is enough: kernels are chosen by shapes and dtypes. The head's are loaded with the graphs of decode steps
(see `DecodeGraphs.pad_sampled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from toka_engine.model.ops import Fp8Gemm, Gemm, Ops

_STEPS = ((256, 8), (1024, 16), (2048, 32), (4096, 128), (1 << 30, 1024))
"""Distance between numbers of rows, as (up to this number, distance): wider apart where chunks of prompts fill a step
whose streams wait for nothing. One more row than a multiple of it begins what the next kernel is for."""


class Products:
    """The GEMMs of a model's linear layers, one of each shape."""

    def __init__(self) -> None:
        self._launches: dict[tuple[object, ...], Callable[[int], torch.Tensor]] = {}
        """Multiplies zeros of so many rows, by shape."""

    def watch(self, ops: Ops) -> Ops:
        """Return `ops` whose linear layers are known here once they are made."""
        make_linear, fp8 = ops.make_linear, ops.fp8

        def make(weight: torch.Tensor, bias: torch.Tensor | None) -> Gemm:
            gemm = make_linear(weight, bias)
            key = (weight.dtype, *weight.shape, bias is None)
            self._launches.setdefault(key, lambda rows: gemm(weight.new_zeros(rows, weight.shape[1])))
            return gemm

        if fp8 is None:
            return replace(ops, make_linear=make)
        make_fp8_linear = fp8.make_linear

        def make_fp8(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Fp8Gemm:
            gemm = make_fp8_linear(weight, scale, bias)
            key = (weight.dtype, *weight.shape, bias is None)

            def launch(rows: int) -> torch.Tensor:
                values = torch.zeros((rows, weight.shape[1]), dtype=weight.dtype, device=weight.device)
                return gemm((values, scale.new_ones(rows, 1)))

            self._launches.setdefault(key, launch)
            return gemm

        return replace(ops, make_linear=make, fp8=replace(fp8, make_linear=make_fp8))

    @torch.inference_mode()
    def load(self, most_rows: int) -> None:
        """Launch every GEMM with numbers of rows up to `most_rows`, and forget them all."""
        for launch in self._launches.values():
            for rows in list_row_counts(most_rows):
                launch(rows)
        self._launches.clear()


def list_row_counts(most: int) -> Iterator[int]:
    """List the numbers of rows up to `most` for which kernels are loaded, in ascending order."""
    rows = 1
    while rows < most:
        rows = min(most, rows + next(distance for limit, distance in _STEPS if rows < limit))
        yield rows
