"""A torch.compile backend, used by `compiled_model`: a traced forward becomes compiled regions and calls between.

What inductor must not look into is an operator without an implementation in the trace: attention, which writes KV
pages that the trace does not know, and GEMMs whose weights are packed. The trace is split there. These calls run as
they are, in the trace's order; inductor compiles the regions between them, equal ones once: the layers of a decoder
differ only in their weights, so a model of any depth takes three compilations. Knows no model and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch._inductor
from torch import fx
from torch.fx.passes.split_module import split_module

Region: TypeAlias = Callable[..., Any]
"""The region's inputs, in its order -> its outputs."""

torch.library.define("toka::attend", "(int layer, Tensor q, Tensor k, Tensor v, Tensor cos_sin) -> Tensor")
torch.library.define("toka::linear", "(Tensor x, int index, int width) -> Tensor")

attend: Any = torch.ops.toka.attend.default
"""layer, q, k, v, cos_sin -> [T, num_heads, head_dim]: an AttentionBackend's forward, in a trace."""
packed_linear: Any = torch.ops.toka.linear.default
"""x [rows, in], index, width -> [rows, width]: a linear layer with packed weights, in a trace."""

_VIEWS = {"view", "reshape", "split", "chunk", "narrow", "transpose", "unsqueeze", "squeeze", "getitem", "size"}
"""Calls that compute nothing: a region of these alone stays as it is."""


def _attend_shape(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


def _linear_shape(x: torch.Tensor, index: int, width: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], width))


torch.library.register_fake("toka::attend", _attend_shape)
torch.library.register_fake("toka::linear", _linear_shape)


class RegionCompiler:
    """A backend of torch.compile, for one model. Counts the graphs it got and the regions it compiled."""

    def __init__(self, run_attention: Region, linears: Sequence[Region]) -> None:
        """`run_attention` and `linears[index]` are what `attend` and `packed_linear` stand for."""
        self._run_attention, self._linears = run_attention, linears
        self.num_graphs = self.num_regions = 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Region:
        """Compile `graph` and return its callable. Raises whatever inductor raises."""
        self.num_graphs += 1
        numbers: dict[fx.Node, int] = {}
        number = 0
        for node in graph.graph.nodes:
            is_outside = node.target in (attend, packed_linear)
            number += is_outside
            numbers[node] = number
            number += is_outside
        parts = split_module(graph, graph, numbers.__getitem__, keep_original_order=True)
        compiled: dict[Any, Region] = {}
        for name, part in list(parts.named_children()):
            delattr(parts, name)  # a module may not be replaced by something that is none
            setattr(parts, name, self._make(part, compiled))
        forward: Region = parts.forward
        return forward

    def _make(self, part: fx.GraphModule, compiled: dict[Any, Region]) -> Region:
        calls = [node for node in part.graph.nodes if node.op.startswith("call")]
        if calls[0].target is attend:
            return _replace_call(part, calls[0], self._run_attention, calls[0].args)
        if calls[0].target is packed_linear:
            x, index, _ = calls[0].args
            return _replace_call(part, calls[0], self._linears[index], (x,))
        if all(_name_of(node) in _VIEWS for node in calls):
            return part.forward
        meaning = _describe(part)
        if meaning not in compiled:
            inputs = [node.meta["example_value"] for node in part.graph.nodes if node.op == "placeholder"]
            compiled[meaning] = torch._inductor.compile(part, inputs)
            self.num_regions += 1
        return compiled[meaning]


def _replace_call(part: fx.GraphModule, call: fx.Node, function: Region, arguments: tuple[Any, ...]) -> Region:
    """`part`, whose one node is `call`, with `function` in its place."""
    part.__dict__["outside"] = function
    call.op, call.target, call.args = "call_module", "outside", arguments
    part.recompile()
    return part.forward


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _describe(part: fx.GraphModule) -> tuple[Any, ...]:
    """Return a region's code without the names of its values: equal where one compilation serves both."""
    places = {node: f"%{place}" for place, node in enumerate(part.graph.nodes)}
    lines: list[Any] = []
    for node in part.graph.nodes:
        match node.op:
            case "placeholder":
                lines.append(_describe_input(node.meta["example_value"]))
            case "get_attr":
                lines.append(id(getattr(part, str(node.target))))
            case _:
                lines.append((node.target, repr(fx.map_arg((node.args, node.kwargs), places.__getitem__))))
    return tuple(lines)


def _describe_input(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
    return repr(value)
