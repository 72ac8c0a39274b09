"""Symbolic sizes: the batch, and others that torch.compile leaves open. Facts hold for every value they can take.

The analysis runs at one size. What it finds is true at all of them, since it says the same of every position along a
symbolic dimension (`evenly`), and rules that mix positions there do not count (`rules/registry.py`).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from fxsparse.errors import CaptureError
from fxsparse.ir.bits import whole
from fxsparse.ir.graph import arg, aten

RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
# What they give lies along a dimension in their own order: positions of one remainder have nothing in common.
_JOINS = (
    aten.cat.default, aten.constant_pad_nd.default, aten.pad.default, aten.repeat.default, aten.roll.default,
    aten.flip.default,
)  # fmt: skip


def symbolic_dims(node: fx.Node) -> list[int]:
    """Dimensions of a node's value whose size is symbolic."""
    return [dim for dim, size in enumerate(_shape(node)) if not isinstance(size, int)]


def squeezes_batch(node: fx.Node) -> bool:
    """Whether it is a squeeze that takes another dimension too where a symbolic size is 1."""
    return node.target in _SQUEEZES and not {*squeezed(node)}.isdisjoint(symbolic_dims(cast(fx.Node, node.args[0])))


def squeezed(node: fx.Node) -> list[int]:
    """The dimensions that a squeeze takes where their size is 1."""
    rank = rank_of(cast(fx.Node, node.args[0])) or 1  # a number may be squeezed along dimension 0
    if node.target is aten.squeeze.default:
        return [*range(rank)]
    dims = arg(node, "dim")
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


def open_sizes(inputs: Iterable[fx.Node]) -> bool:
    """Whether another size of the inputs than the batch is symbolic, such as the length of a sequence."""
    return any(dim > 0 for node in inputs for dim in symbolic_dims(node))


def rank_of(node: fx.Node) -> int:
    """The number of dimensions of a node's value; 0 where it is no tensor."""
    return len(_shape(node))


def reads_a_size(node: fx.Node) -> bool:
    """Whether a symbolic number is among the node's arguments."""
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(isinstance(n.meta.get("val"), numbers) for n in node.all_input_nodes)


def concrete(node: fx.Node, batch: int = 1, more: int = 0) -> list[int]:
    """The sizes of a node's value at `batch` samples, all other symbolic sizes `more` than the example's.

    The batch is the first size in a dimension 0 of the inputs, and the others there that the example has equal: traces
    may have a symbol for each input. Raises CaptureError for a size that does not follow from those of the inputs.
    """
    return [size if isinstance(size, int) else _at(size, node, batch, more) for size in _shape(node)]


def one_sample(node: fx.Node, floats: torch.dtype | None = None) -> Any:
    """Zeros of a placeholder's shape, one sample of it, floating point ones in `floats`; other values as they are."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    dtype = floats if floats and value.is_floating_point() else value.dtype
    return torch.zeros(concrete(node), dtype=dtype, device=value.device)


def _at(size: Any, node: fx.Node, batch: int, more: int) -> int:
    shapes = [*map(_shape, node.graph.find_nodes(op="placeholder"))]
    found = [(dim, s.node) for shape in shapes for dim, s in enumerate(shape) if not isinstance(s, int)]
    samples = next((n.hint for dim, n in found if dim == 0), None)
    values = {n.expr: sympy.Integer(n.hint + more) for _, n in found if n.expr.is_symbol}
    values |= {n.expr: sympy.Integer(batch) for dim, n in found if dim == 0 and n.hint == samples}
    at = size.node.expr.xreplace(values)
    if not at.is_number:
        raise CaptureError(f"size of {node.name}", expected="one that follows from the inputs' sizes", got=str(size),
                           do="Compile for one size: dynamic_batch=False, or dynamic=False.")  # fmt: skip
    return int(at)


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def evenly(node: fx.Node, bits: Tensor) -> Tensor:
    """`bits` of the node's value with, along symbolic dimensions, each one set wherever one of its kind is."""
    for dim, inner in _units(node):
        if bits.shape[dim] > inner:
            parts = bits.unflatten(dim, (-1, inner))
            bits = whole(parts, dim).flatten(dim, dim + 1)
    return bits


def varies(node: fx.Node, value: Tensor) -> Tensor | None:
    """Bool of the value's shape: where another value lies at a position of the same kind. None: there is but one."""
    found = None
    for dim, inner in _units(node):
        if value.shape[dim] > inner:
            parts = value.unflatten(dim, (-1, inner))
            differs = (parts != parts.narrow(dim, 0, 1)).flatten(dim, dim + 1)
            found = differs if found is None else found | differs
    return None if found is None else evenly(node, found)


def _units(node: fx.Node) -> list[tuple[int, int]]:
    """(dimension, k): positions i and j of it are of one kind when i = j modulo k.

    A size of 8 * b comes from dimensions b and 8, in this order: what is known of the 8 stays.
    """
    mixed = crossing(node)[1]
    units = [
        (dim, 1 if node.target in _JOINS else _known([_shape(node)[dim].node.expr])) for dim in symbolic_dims(node)
    ]
    return [*((dim, 1) for dim in mixed), *(unit for unit in units if unit[0] not in mixed)]


def crossing(node: fx.Node) -> tuple[list[int], list[int]]:
    """Dimensions before and after a reshape whose strides depend on symbolic sizes; none for all other nodes."""
    if node.target not in RESHAPES or not symbolic_dims(node):
        return [], []
    return crossing_dims(_shape(node.all_input_nodes[0]), _shape(node))


def crossing_dims(before: Sequence[Any], after: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Where, in a reshape from `before` to `after`, known sizes do not keep their strides for all symbolic ones.

    Nowhere in [b, 8, s] -> [8 * b, s]; in all but the b of [b, 8, s] -> [b, 8 * s]; everywhere in [s, 8] -> [8, s].
    """
    left, right = map(_expressions, (before, after))
    ends = {product: i for i, product in enumerate(itertools.accumulate(left, operator.mul), 1)}
    ends[sympy.Integer(1)] = 0
    found: tuple[list[int], list[int]] = [], []
    i = j = 0
    products = [*itertools.accumulate(right, operator.mul)]
    for end, product in enumerate(products, 1):
        last = end == len(products)
        if product not in ends and not last:
            continue
        stop = len(left) if last else ends[product]
        parts = left[i:stop], right[j:end]  # as many elements on both sides: a reshape of its own
        if not all(map(_known_inside, parts)) or _known(parts[0]) != _known(parts[1]) or product not in ends:
            found[0].extend(range(i, stop))
            found[1].extend(range(j, end))
        i, j = stop, end
    return found


def _expressions(sizes: Sequence[Any]) -> list[Any]:
    return [sympy.Integer(size) if isinstance(size, int) else size.node.expr for size in sizes]


def _known(sizes: Sequence[Any]) -> int:
    return math.prod(int(abs(size.as_coeff_Mul()[0])) for size in sizes)


def _known_inside(sizes: Sequence[Any]) -> bool:
    """No symbolic size lies behind a known one."""
    sizes = [size for size in sizes if size != 1]
    known = [_known([size]) > 1 for size in sizes]
    return not any(known[i] and not sizes[i + 1].is_number for i in range(len(sizes) - 1))
