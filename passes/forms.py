"""Forms of one operator that `canonicalize` writes as another: products, padding, gates, extremes, heads."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any, cast

import torch
from torch import fx

from fxsparse.ir.graph import arg, aten, flat
from fxsparse.ir.symbols import RESHAPES, one_sample, squeezed

_EXTREMES = {aten.max.dim: aten.amax.default, aten.min.dim: aten.amin.default}
_ADAPTIVE = {
    aten.adaptive_max_pool1d.default: aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default: aten.max_pool2d.default,
    aten.adaptive_max_pool3d.default: aten.max_pool3d.default,
}
PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)


def is_product(node: fx.Node, constant: Container[fx.Node]) -> bool:
    """A product x @ w with a stored matrix w, or with a stored vector of as many elements added."""
    *bias, x, w = cast(Any, node.args)[: 3 if node.target is aten.addmm.default else 2]
    if (
        w not in constant
        or w.meta["val"].dim() != 2
        or not w.meta["val"].is_floating_point()
        or x in constant
        or x.meta["val"].dim() < 2
    ):
        return False
    plain = not bias or (arg(node, "alpha") == arg(node, "beta") == 1)
    return plain and all(b in constant and b.meta["val"].shape == w.meta["val"].shape[1:] for b in bias)


def write_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Returns the transposed matrix, which is to be computed."""
    *bias, x, w = cast(Any, node.args)[: 3 if node.target is aten.addmm.default else 2]
    with gm.graph.inserting_before(node):
        turned = gm.graph.call_function(aten.t.default, (w,))
        turned.meta.update({**node.meta, "val": w.meta["val"].t()})
        new = gm.graph.call_function(aten.linear.default, (x, turned, *bias))
    _take_place(gm, new, node)
    return turned


def spreads_bias(node: fx.Node) -> bool:
    """Whether it is a linear layer whose bias is no vector of its rows, but one number for all, or more of them."""
    bias = arg(node, "bias") if node.target is aten.linear.default else None
    return isinstance(bias, fx.Node) and bias.meta["val"].shape != cast(fx.Node, node.args[1]).meta["val"].shape[:1]


def write_bias(gm: fx.GraphModule, node: fx.Node) -> None:
    """linear(x, w, bias) -> linear(x, w) + bias"""
    x, w, bias = cast(Any, node.args)
    with gm.graph.inserting_before(node):
        product = gm.graph.call_function(aten.linear.default, (x, w))
        product.meta.update(node.meta)
        new = gm.graph.call_function(aten.add.Tensor, (product, bias))
    _take_place(gm, new, node)


def write_conversion(gm: fx.GraphModule, node: fx.Node) -> None:
    """type_as(x, y) -> _to_copy(x, dtype and device of y); x where it has them."""
    x, y = (cast(fx.Node, n).meta["val"] for n in node.args)
    if (x.dtype, x.device) == (y.dtype, y.device):
        node.replace_all_uses_with(cast(fx.Node, node.args[0]))
        gm.graph.erase_node(node)
        return
    node.target = aten._to_copy.default
    node.args, node.kwargs = node.args[:1], {"dtype": y.dtype, "device": y.device}


def write_padding(gm: fx.GraphModule, node: fx.Node) -> None:
    """`pad` as `constant_pad_nd`."""
    with gm.graph.inserting_before(node):
        fill = arg(node, "value") or 0.0
        new = gm.graph.call_function(aten.constant_pad_nd.default, (node.args[0], arg(node, "pad"), fill))
    _take_place(gm, new, node)


def write_squeeze(gm: fx.GraphModule, node: fx.Node) -> None:
    """A squeeze of the dimensions whose size is 1 whatever the input."""
    sizes = cast(fx.Node, node.args[0]).meta["val"].shape
    ones = [dim for dim in squeezed(node) if isinstance(sizes[dim], int) and sizes[dim] == 1]
    node.target = aten.squeeze.dims
    node.args, node.kwargs = (node.args[0], ones), {}


def takes_one_sample(gm: fx.GraphModule) -> bool:
    """Whether the graph runs on a batch of one: shape functions let pass what some kernels refuse."""
    try:
        with torch.no_grad():
            flat(gm)(*map(one_sample, gm.graph.find_nodes(op="placeholder")))
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def write_glu(gm: fx.GraphModule, node: fx.Node) -> None:
    """The first half times the sigmoid of the second."""
    x, dim = cast(fx.Node, node.args[0]), arg(node, "dim")
    half = node.meta["val"].shape[dim]
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function
        first, second = (call(aten.slice.Tensor, (x, dim, half * i, half * (i + 1))) for i in (0, 1))
        gate = call(aten.sigmoid.default, (second,))
        new = call(aten.mul.Tensor, (first, gate))
    for n in (first, second, gate):
        n.meta.update(node.meta)
    _take_place(gm, new, node)


def is_extreme(node: fx.Node) -> bool:
    """Extremes and their positions, where nobody reads the positions; of windows only where all are of one size."""
    known = node.target in _EXTREMES or (node.target in _ADAPTIVE and (_of_all(node) or bool(_windows(node))))
    return known and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def write_extreme(gm: fx.GraphModule, node: fx.Node) -> None:
    """Amax or amin, or a pool with windows of one size."""
    x, target = cast(fx.Node, node.args[0]), cast(Any, node.target)
    if target in _EXTREMES:
        target, args = _EXTREMES[target], [[arg(node, "dim")], arg(node, "keepdim")]
    elif _of_all(node):
        target, args = aten.amax.default, [[*range(-len(arg(node, "output_size")), 0)], True]
    else:
        target, args = _ADAPTIVE[target], [_windows(node), _windows(node)]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(target, (x, *args))
    for item in list(node.users):
        item.replace_all_uses_with(new)
        gm.graph.erase_node(item)
    _take_place(gm, new, node)
    new.meta["val"] = node.meta["val"][0]


def _of_all(node: fx.Node) -> bool:
    return all(size == 1 for size in arg(node, "output_size"))


def _windows(node: fx.Node) -> list[int]:
    """Sizes of an adaptive pool's windows, its strides too; empty where they differ or depend on the input."""
    outputs = arg(node, "output_size")
    sizes = cast(fx.Node, node.args[0]).meta["val"].shape[-len(outputs) :]
    equal = all(isinstance(n, int) and n % out == 0 for n, out in zip(sizes, outputs, strict=True))
    return [n // out for n, out in zip(sizes, outputs, strict=True)] if equal else []


def splits_heads(node: fx.Node) -> bool:
    """[L, B, E] -> [L, B * heads, D] -> [B * heads, L, D] -> [B, heads, L, D], as nn.MultiheadAttention has it.

    The batch is symbolic, so no head could be cut from B * heads.
    """
    turned = node.args[0] if node.target in RESHAPES else None
    if not isinstance(turned, fx.Node) or turned.target is not aten.transpose.int or len(turned.users) > 1:
        return False
    merged = cast(Any, turned.args[0])
    if merged.target not in RESHAPES or len(merged.users) > 1 or {arg(turned, "dim0"), arg(turned, "dim1")} != {0, 1}:
        return False
    x, after = merged.args[0].meta["val"].shape, node.meta["val"].shape
    if len(x) != 3 or len(after) != 4 or not isinstance(after[1], int):
        return False
    batch, heads, length, width = after
    sizes = [*x, *merged.meta["val"].shape]
    return [*map(str, sizes)] == [*map(str, (length, batch, heads * width, length, batch * heads, width))]


def write_heads(gm: fx.GraphModule, node: fx.Node) -> None:
    """[L, B, E] -> [L, B, heads, D] -> [B, heads, L, D]."""
    merged = cast(Any, node.args[0]).args[0]
    x, (_, heads, _, width) = merged.args[0], node.meta["val"].shape
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function
        sizes = [size if isinstance(size, int) else call(aten.sym_size.int, (x, d))
                 for d, size in enumerate(x.meta["val"].shape[:2])]  # fmt: skip
        apart = call(aten.reshape.default, (x, [*sizes, heads, width]))
        new = call(aten.permute.default, (apart, [1, 2, 0, 3]))
    apart.meta.update({**node.meta, "val": node.meta["val"].permute(2, 0, 1, 3)})
    for n, size in zip(sizes, x.meta["val"].shape, strict=False):
        if isinstance(n, fx.Node):
            n.meta["val"] = size
    _take_place(gm, new, node)


def _take_place(gm: fx.GraphModule, new: fx.Node, node: fx.Node) -> None:
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
