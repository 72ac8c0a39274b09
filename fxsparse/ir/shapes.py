"""Fake shapes for a graph that has none, because it was read from a file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxsparse.ir.graph import refresh
from fxsparse.ir.inputs import in_batch

_ONE_THREAD = threading.Lock()


def propagate(gm: fx.GraphModule, example: Sequence[Any], *, dynamic_batch: bool) -> fx.GraphModule:
    """`gm` with `meta["val"]` on every node, as capture leaves it: with `dynamic_batch` the batch is one symbol.

    A graph that has them is left as it is.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # here and below: they load half of the compiler

    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    with _ONE_THREAD:
        if all("val" in node.meta for node in inputs):
            return gm
        mode = FakeTensorMode(shape_env=ShapeEnv())
        for node, x, varies in zip(inputs, example, in_batch(example), strict=True):
            node.meta["val"] = _fake(mode, node.name, x, dynamic_batch and varies) if isinstance(x, Tensor) else x
        refresh(gm)
    return gm


def _fake(mode: FakeTensorMode, name: str, x: Tensor, dynamic_batch: bool) -> Tensor:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    if not dynamic_batch:
        return mode.from_tensor(x, static_shapes=True)
    if x.shape[0] == 1:  # a size of 1 is always taken for a constant
        x = torch.cat([x, x])
    # DUCK: equal sizes are one symbol
    sizes = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (x.dim() - 1)
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * x.dim())
    return mode.from_tensor(x, source=ConstantSource(name), symbolic_context=context)
