"""Linear layers of shuffled blocks and few tokens on a GPU: the operator `fxsparse::shuffled_block_few`.

    shuffled_block(x [..., I]) [..., O]  ->  sum(shuffled_block_few(x), 0)

Reading the values is all that takes time there. Each group's columns are cut into parts, for more of the GPU to read
them; who compiles the graph adds the parts in one kernel with what follows. Nothing is turned.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.formats.operator import LIBRARY, TAGS
from fxsparse.formats.shuffled_block_aten import ACTIVATIONS
from fxsparse.ir.graph import arg, aten
from fxsparse.kernels.triton import few_parts, shuffled_block_transposed
from fxsparse.kernels.triton import shuffled_block_few as kernel

LIBRARY.define(
    "shuffled_block_few(Tensor x, Tensor rows, Tensor row_ptr, Tensor columns, Tensor column_ptr,"
    " Tensor values, Tensor value_ptr, int out_features) -> Tensor",
    tags=TAGS,
)
few = torch.ops.fxsparse.shuffled_block_few.default
FEW = 4  # tokens; as matrices so many take an H200 as long


def has_few(layer: fx.Node) -> bool:
    """Whether its x has few tokens; where their number is open, as it was traced, with two samples for one.

    A graph for few tokens takes any number: `_cuda` looks again.
    """
    sizes = cast(fx.Node, layer.args[0]).meta["val"].shape[:-1]
    return math.prod(n if isinstance(n, int) else n.node.hint or FEW + 1 for n in sizes) <= FEW


def lower(gm: fx.GraphModule, node: fx.Node, arrays: list[fx.Node]) -> fx.Node:
    """What replaces `node`, a linear layer's call of `shuffled_block`, before which it is put."""
    call: Any = gm.graph.call_function
    x, residual, activation = cast(fx.Node, node.args[0]), arg(node, "residual"), arg(node, "activation")
    y = call(aten.sum.dim_IntList, (call(few, (x, *arrays, cast(Any, arg(node, "shape"))[0])), [0]))
    for other in (arg(node, "bias"), residual):
        y = y if other is None else call(aten.add.Tensor, (y, other))
    y = y if activation == "none" else call(ACTIVATIONS[cast(str, activation)], (y,))
    return cast(fx.Node, call(aten._to_copy.default, (y,), {"dtype": node.meta["val"].dtype}))


def _sums(x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Room for the parts: float32, or wider."""
    rows, row_ptr, columns, *_, out_features = arguments
    shape = (few_parts(rows, row_ptr, columns), *x.shape[:-1], out_features)
    return x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    *packed, out_features = arguments
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    call: Any = kernel if len(flat) <= FEW else _many
    y = call(flat, *packed, out_features=out_features)
    return cast(Tensor, y.view(y.shape[0], *x.shape[:-1], out_features))


def _many(x: Tensor, *packed: Tensor, out_features: int) -> Tensor:
    """As many as are faster multiplied as a matrix, all in the first part."""
    y = _sums(x, (*packed, out_features))
    y[0] = cast(Any, shuffled_block_transposed)(x.t().contiguous(), *packed, out_features=out_features).t()
    return y


def product(x: Tensor, *arguments: Any) -> Tensor:
    """Rows of x [I, ...] to those of [O, ...], in PyTorch's own operators: any device and dtype, nothing added."""
    rows, row_ptr, columns, column_ptr, values, value_ptr, out_features = arguments
    y = x.new_zeros(out_features, *x.shape[1:])
    for g in range(len(row_ptr) - 1):
        block = values[int(value_ptr[g]) : int(value_ptr[g + 1])]
        row, column = rows[int(row_ptr[g]) : int(row_ptr[g + 1])], columns[int(column_ptr[g]) : int(column_ptr[g + 1])]
        if len(column):
            y[row] = torch.tensordot(block.view(len(column), -1)[:, : len(row)].to(x.dtype), x[column], ([0], [0]))
    return y


def reference(x: Tensor, *arguments: Any) -> Tensor:
    """The same by `product`, all of it in the first part."""
    y = _sums(x, arguments)
    y[0] = product(x.movedim(-1, 0).to(y.dtype), *arguments).movedim(0, -1)
    return y


torch.library.register_fake("fxsparse::shuffled_block_few", lambda x, *rest: _sums(x, rest), lib=LIBRARY)
LIBRARY.impl("shuffled_block_few", reference, "CompositeExplicitAutograd")
LIBRARY.impl("shuffled_block_few", _cuda, "CUDA")
