"""Test models around one operator, and a plain interpreter to check claims about a graph by brute force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.rules import Sample

F64 = torch.float64


class Wrapped(nn.Module):
    """layer -> sample -> layer, so that zeros before and after the operator are seen by it.

    Rows of the layers before it are dead (or constant: their bias lives), columns of the layer after it are dead.
    """

    def __init__(self, sample: Sample, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.function = sample.function
        self.before = nn.ModuleList(
            [_layer(shape, 3, shape_channels(shape), g, dead_rows=True) for shape in sample.shapes]
        )
        with torch.no_grad():
            shape = sample.function(*[torch.rand(s, dtype=F64) for s in sample.shapes]).shape
        self.after = _layer(tuple(shape), shape_channels(tuple(shape)), 2, g, dead_rows=False)

    def inputs(self, shapes: tuple[tuple[int, ...], ...], seed: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(_with_channels(s, 3), generator=g, dtype=F64) for s in shapes)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.after(self.function(*[layer(x) for layer, x in zip(self.before, xs, strict=True)]))


def shape_channels(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]


def _with_channels(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    return (shape[0], channels, *shape[2:]) if len(shape) == 4 else (*shape[:-1], channels)


def _layer(shape: tuple[int, ...], ins: int, outs: int, g: torch.Generator, *, dead_rows: bool) -> nn.Module:
    layer = nn.Conv2d(ins, outs, 1) if len(shape) == 4 else nn.Linear(ins, outs)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
        if dead_rows:
            layer.weight[torch.rand(outs, generator=g) < 0.5] = 0
            layer.bias[torch.rand(outs, generator=g) < 0.5] = 0
        else:
            layer.weight[:, torch.rand(ins, generator=g) < 0.5] = 0
    return layer


def interpret(
    gm: fx.GraphModule, inputs: tuple[Any, ...], change: Mapping[fx.Node, Callable[[Tensor], Tensor]]
) -> dict:
    """Values of every node; `change` edits some of them before anyone reads them."""
    values: dict[fx.Node, Any] = {}
    rest = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "get_attr":
            values[node] = gm.get_buffer(node.target)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
        else:
            values[node] = fx.map_arg(node.args[0], lambda n: values[n])
        if node in change and isinstance(values[node], Tensor):
            values[node] = change[node](values[node])
    return values
