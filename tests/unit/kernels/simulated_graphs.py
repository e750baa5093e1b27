"""CUDA graphs on a CPU: a capture keeps what is computed meanwhile, and a replay computes it again in the same place.

Kept are torch's operators, the launches of Triton's interpreter, and whatever a test has wrapped by `kept_as_one`.
Unlike on a GPU, torch's operators are also computed when they are captured, and graphs do not share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SimulatedGraph:
    """A torch.cuda.CUDAGraph. Graphs are captured one at a time."""

    capturing: SimulatedGraph | None = None

    def __init__(self) -> None:
        self.num_replays = 0
        self._work: list[Callable[[], None]] = []

    def keep(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def capture_begin(self, pool: Any) -> None:
        assert SimulatedGraph.capturing is None, "captures do not nest"
        SimulatedGraph.capturing = self
        self._mode = _Keeping(self)
        self._mode.__enter__()

    def capture_end(self) -> None:
        assert SimulatedGraph.capturing is self
        self._mode.__exit__(None, None, None)
        SimulatedGraph.capturing = None

    def replay(self) -> None:
        assert SimulatedGraph.capturing is None
        self.num_replays += 1
        for work in self._work:
            work()


class _Keeping(TorchDispatchMode):
    """Keeps every operator for a graph."""

    def __init__(self, graph: SimulatedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.__name__.startswith("empty"):
            given = {each.untyped_storage().data_ptr() for each in _tensors_of((args, kwargs))}
            outputs = [each.untyped_storage().data_ptr() not in given for each in _tensors_of(result)]

            def compute() -> None:
                for is_new, old, new in zip(
                    outputs, _tensors_of(result), _tensors_of(func(*args, **kwargs)), strict=True
                ):
                    if is_new:  # others are views, or were written in place
                        old.copy_(new)

            self._graph.keep(compute)
        return result


def _tensors_of(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def kept_as_one(launch: Callable[..., None]) -> Callable[..., None]:
    """Make a kernel of a function that writes to its arguments: in a capture it is kept, and not called."""

    def call(*args: Any, **kwargs: Any) -> None:
        graph = SimulatedGraph.capturing
        if graph is None:
            launch(*args, **kwargs)
        else:
            graph.keep(lambda: launch(*args, **kwargs))

    return call


@contextmanager
def _capture(graph: SimulatedGraph, pool: Any) -> Iterator[None]:
    graph.capture_begin(pool)
    yield
    graph.capture_end()


@contextmanager
def simulated_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch.cuda make such graphs."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def keep_launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return kept_as_one(launch)(executor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", keep_launch)
        patch.setattr(torch.cuda, "CUDAGraph", SimulatedGraph)
        patch.setattr(torch.cuda, "graph", _capture)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(torch.cuda, "Stream", lambda: None)
        patch.setattr(torch.cuda, "stream", lambda stream: _nothing())
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        for module in ("layer_graphs", "decode_graphs"):
            patch.setattr(f"toka_engine.model.cuda.{module}.alias", lambda tensor: tensor)
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
