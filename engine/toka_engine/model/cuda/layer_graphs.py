"""CUDA graphs of what lies between one layer's attention and the next one's, for steps with prompts.

Such a step is launched kernel by kernel where its attention is concerned, which depends on the lengths of its chunks.
All else depends on the number of rows alone, so it is captured for some numbers of rows, and a step is padded to the
next of them. Of a layer's eleven launches seven become one, and the host, which takes longer than the device for a step
of few hundred rows, has little left to do.

A capture runs the model's own forward, with an attention that ends one graph and begins the next. All rows go through
the last layer, also those that nobody samples: which ones are wanted is no number of rows.

The graphs hold no address of the KV cache or of the block table, so they outlive both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from toka_engine.model.attention_backend import AttentionBackend
from toka_engine.model.causal import CausalModel
from toka_engine.model.cuda.attention import CudaAttention
from toka_engine.model.cuda.foreign_memory import alias
from toka_engine.model.cuda.graph_sizes import layer_graph_sizes


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    """One layer's attention, as the capture met it: [size, heads, head_dim] each, in the graphs' memory."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A forward of one number of rows: a graph, a call, a graph, a call, ..., and the last graph."""

    first: torch.cuda.CUDAGraph
    others: list[tuple[_AttentionCall, torch.cuda.CUDAGraph]]
    """Each attention, and the graph behind it."""
    hidden: torch.Tensor
    """[size, hidden_size]: what the last graph leaves."""


class LayerGraphs:
    """CUDA graphs of the forward of up to `max_rows` rows, captured by `capture`."""

    def __init__(self, model: CausalModel, attention: CudaAttention, max_rows: int) -> None:
        self.max_rows = max_rows
        self._model, self._attention = model, attention
        self._ids = torch.zeros(max_rows, dtype=torch.int32, device=attention.shape.device)
        self._sizes = np.array(layer_graph_sizes(max_rows))
        self._pieces: dict[int, _Pieces] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # memory is shared within one stream
        for size in reversed(self._sizes.tolist()):
            self._pieces[size] = self._capture(size, pool, stream)

    def take_ids(self, num_rows: int) -> torch.Tensor:
        """Return where the ids of the next forward's rows are to be written: [num_rows] int32."""
        return self._ids[:num_rows]

    def forward(self, num_rows: int) -> torch.Tensor:
        """Compute the step that the attention has planned, of the ids in `take_ids`.

        Returns the hidden states of all its rows [num_rows, hidden_size], valid until the next forward.
        """
        pieces = self._pieces[int(self._sizes[np.searchsorted(self._sizes, num_rows)])]
        attend = self._attention.attend
        pieces.first.replay()
        for call, graph in pieces.others:
            attend(
                call.layer, call.q[:num_rows], call.k[:num_rows], call.v[:num_rows], call.cos_sin, call.out[:num_rows]
            )  # fmt: skip
            graph.replay()
        return pieces.hidden[:num_rows]

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> _Pieces:
        ids, blank, cuts = self._ids[:size], _NoAttention(), _Cuts(pool)
        self._model.forward(ids, cast(AttentionBackend, blank))  # loads and allocates what a capture may not
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), cuts.capturing():
            hidden = self._model.forward(ids, cast(AttentionBackend, cuts))
        return _Pieces(cuts.graphs[0], list(zip(cuts.calls, cuts.graphs[1:], strict=True)), alias(hidden))


class _NoAttention:
    """Stands for attention in a forward whose results nobody reads."""

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)


class _Cuts:
    """Stands for attention in a capture: each call ends a graph and begins the next.

    What a call reads and writes stays where it is in the graphs' memory. No tensor keeps it: as the capture goes on,
    later pieces may write there, as they will when they are replayed in the same order.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.calls: list[_AttentionCall] = []

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture what is launched on the current stream, which is not the default one."""
        self._begin()
        try:
            yield
        finally:
            self.graphs[-1].capture_end()

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor
    ) -> torch.Tensor:
        """See AttentionBackend."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.graphs[-1].capture_end()
        self.calls.append(_AttentionCall(layer, alias(q), alias(k), alias(v), cos_sin, alias(out)))
        self._begin()
        return out

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self.graphs.append(graph)
        graph.capture_begin(pool=self._pool)
