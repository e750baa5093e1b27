"""A causal model that torch.compile has compiled.

It is compiled when it is made, so before any step runs, for any number of rows (`_mark_rows`); a trace that would be
good for some numbers alone ends the start. CUDA graphs stay the runner's: inductor makes none, and its kernels are
captured like others.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch._dynamo.decorators import mark_dynamic, mark_unbacked
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor import list_mode_options
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from toka_engine.errors import ConfigError
from toka_engine.model.attention_backend import AttentionBackend
from toka_engine.model.causal import CausalModel
from toka_engine.model.ops import Gemm
from toka_engine.model.torch_compile.regions import RegionCompiler, attend, packed_linear

_FIRST_ROWS = {"cpu": 2, "cuda": 1024}
"""Rows of the first run. On a GPU, inductor's Triton kernels are tuned at this size."""

logger = logging.getLogger("toka.model")


class CompiledModel:
    """A causal.CausalModel around another one. Its head is not compiled: it is one GEMM."""

    def __init__(self, model: CausalModel, outside: Outside) -> None:
        self.config = model.config
        self.logits = model.logits
        self.regions = RegionCompiler(outside.run_attention, outside.linears)
        self._model, self._outside = model, outside
        traced: Any = _TracedAttention()

        def forward(ids: torch.Tensor) -> torch.Tensor:
            return model.forward(ids, traced)

        self._forward = torch.compile(forward, backend=self.regions, fullgraph=True)

    def forward(
        self, ids: torch.Tensor, attention: AttentionBackend, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See causal.CausalModel. All rows are computed to the end: another number of them would be another trace."""
        if not ids.shape[0]:
            return self._model.forward(ids, attention, wanted)
        self._outside.attention = attention
        hidden: torch.Tensor = self._forward(ids)
        return hidden if wanted is None else hidden.index_select(0, wanted)

    @torch.inference_mode()
    def compile(self, device: torch.device, mode: str, max_rows: int) -> None:
        """Compile for up to `max_rows` rows, by a run with many and one with a single row. Raises ConfigError."""
        began_s = time.monotonic()
        settings: dict[str, Any] = {
            **list_mode_options(mode),
            "compile_threads": 1,  # few regions: no pool of processes that outlives the start
            "cpp_cache_precompile_headers": False,  # would take longer than it saves, and is kept outside the cache
            "cpp.vec_isa_ok": True,  # believe the CPU: each trial would start a process that loads torch
        }
        blank: Any = _BlankAttention()
        try:
            with inductor.patch(settings):
                for rows in (_FIRST_ROWS[device.type], 1):
                    ids = torch.zeros(rows, dtype=torch.int32, device=device)
                    _mark_rows(ids, max_rows)
                    self.forward(ids, blank)
        except TorchDynamoException as error:
            logger.error("event=compile_failed\n%s", error)
            raise ConfigError(f"torch_compile=T: {_summarise(error)}") from error
        seconds = time.monotonic() - began_s
        logger.info("event=compiled regions=%d mode=%s seconds=%.1f", self.regions.num_regions, mode, seconds)


class Outside:
    """The calls of compiled regions to code outside them: the step's attention, and packed GEMMs."""

    def __init__(self) -> None:
        self.linears: list[Gemm] = []
        self.attention: AttentionBackend | None = None

    def add(self, linear: Gemm, width: int) -> Gemm:
        """`linear`, of `width` outputs, as a trace shows it; the same as before where nothing is traced."""
        index = len(self.linears)
        self.linears.append(linear)

        def traced(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = packed_linear(x, index, width) if torch.compiler.is_compiling() else linear(x)
            return result

        return traced

    def run_attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor
    ) -> torch.Tensor:
        assert self.attention is not None, "a region runs without a forward"
        return self.attention.forward(layer, q, k, v, cos_sin)


class _TracedAttention:
    """Attention that only marks its place in a trace."""

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor
    ) -> torch.Tensor:
        result: torch.Tensor = attend(layer, q, k, v, cos_sin)
        return result


class _BlankAttention:
    """Attention for runs that only compile: it needs no pages, and regions do not depend on its values."""

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor
    ) -> torch.Tensor:
        return q.new_zeros(q.shape)


def _mark_rows(ids: torch.Tensor, max_rows: int) -> None:
    """Say, before a trace, that `ids` [rows] may have any number of rows up to `max_rows`.

    On a CPU there is one trace, of a number that it knows nothing about, so that a row gets the same bits alone and
    among others: seeded requests rest on that. What knows nothing fuses less: a norm is two kernels instead of one. So
    on a GPU there is a trace for two rows or more, and one row, for torch a case of its own, gets another.
    """
    if ids.device.type == "cpu":
        mark_unbacked(ids, 0)
    elif ids.shape[0] > 1:
        mark_dynamic(ids, 0, min=2, max=max_rows)


def check_cpu(mode: str) -> None:
    if mode != "default":
        raise ConfigError(
            f"torch_compile_config={mode} has no effect on a CPU, whose GEMMs are not compiled (default is allowed)"
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "torch_compile=T needs a C++ compiler on a CPU, and there is none (g++, or what CXX names); the engine's "
            "image for CPUs has none: use torch_compile=F there"
        ) from error


def _summarise(error: TorchDynamoException) -> str:
    """Return the part of the error that a user can act on, in one line."""
    cause: BaseException = error
    while isinstance(cause, BackendCompilerFailed):
        cause = cause.inner_exception
    if isinstance(cause, CppCompileError):
        lines = [line for line in cause.output.splitlines() if "error" in line] or ["no reason given"]
        return f"the C++ compiler fails: {lines[0].strip()}"
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"the layers cannot be compiled: {lines[0]}"
