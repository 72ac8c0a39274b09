"""Which dimensions share one channel numbering, and whether it may be permuted: for `permute_channels`.

Dimensions are tied as in `rules/`, from shapes alone. Permuting a numbering permutes every weight dimension in it; it
is exact when each operator on the way treats its channels alike. A dimension that meets any other operator is pinned,
with the operator's name. Flattening [N, C, H, W] to [N, C * H * W] makes a numbering that follows another, H * W
indices for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fxsparse.ir.graph import arg, aten, operator_name, owner
from fxsparse.ir.symbols import concrete
from fxsparse.ir.union_find import UnionFind
from fxsparse.rules import rule_of
from fxsparse.rules.contraction import Convolution, Linear
from fxsparse.rules.elementwise import Elementwise, PRelu
from fxsparse.rules.norms import BatchNorm, LayerNorm
from fxsparse.rules.windows import AveragePool, Reduction

Axis = tuple[fx.Node, int]
_PASSING = (
    aten.permute.default, aten.transpose.int, aten.cat.default, aten.slice.Tensor, aten.select.int,
    aten.view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.contiguous.default,
)  # fmt: skip
_FLATTENS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


@dataclass(eq=False)
class Numbering:
    """Dimensions with one numbering.

    pinned     why it may not be permuted; empty when it may
    follows    the numbering whose channels it repeats, `times` times each; None when it has its own
    followers  those that repeat this one's
    """

    axes: list[Axis] = field(default_factory=list)
    pinned: str = ""
    follows: Numbering | None = None
    times: int = 1
    followers: list[Numbering] = field(default_factory=list)

    def hold(self, why: str) -> None:
        """Pin it, and what it follows: that cannot move without it."""
        self.pinned = self.pinned or why
        if self.follows is not None and not self.follows.pinned:
            self.follows.hold(self.pinned)


def numberings(gm: fx.GraphModule) -> dict[Axis, Numbering]:
    """The numbering of every dimension of every tensor value."""
    links = _Links()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            links.pin_all([node, *node.all_input_nodes], f"{node.op} signature")
        elif node.op == "call_function":
            _link(node, links)
    return links.numberings(gm)


class _Links:
    """What the operators say of dimensions: tied, pinned, one flattened into another."""

    def __init__(self) -> None:
        self.tied: UnionFind[Axis] = UnionFind()
        self.pins: dict[Axis, str] = {}
        self.flattened: list[tuple[Axis, Axis, int]] = []

    def tie(self, a: fx.Node, dim_a: int, b: fx.Node, dim_b: int) -> None:
        self.tied.unite((b, dim_b % _rank(b)), (a, dim_a % _rank(a)))

    def pin(self, node: fx.Node, dims: Iterable[int], why: str) -> None:
        for dim in dims:
            self.pins.setdefault((node, dim % _rank(node)), why)

    def pin_all(self, nodes: Iterable[fx.Node], why: str) -> None:
        for node in nodes:
            self.pin(node, range(_rank(node)), why)

    def numberings(self, gm: fx.GraphModule) -> dict[Axis, Numbering]:
        of_root: dict[Axis, Numbering] = {}
        found: dict[Axis, Numbering] = {}
        for axis in [(n, d) for n in gm.graph.nodes for d in range(_rank(n))]:
            found[axis] = of_root.setdefault(self.tied.root(axis), Numbering())
            found[axis].axes.append(axis)
        for flat, source, times in self.flattened:
            _follow(found[flat], found[source], times, flat[0])
        for axis, why in self.pins.items():
            found[axis].hold(why)
        return found


def _follow(flat: Numbering, source: Numbering, times: int, node: fx.Node) -> None:
    """`flat` repeats `source`; both are pinned where that is more than one step or source."""
    if flat.follows not in (None, source) or flat is source or flat.followers or source.follows is not None:
        for numbering in (flat, source):
            numbering.hold(f"{node.name} joins or flattens a flattened tensor again")
    elif flat.follows is None:
        flat.follows, flat.times = source, times
        source.followers.append(flat)


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _shape(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def _link(node: fx.Node, links: _Links) -> None:
    rule = rule_of(node)
    x = next(iter(node.all_input_nodes), node)
    if isinstance(rule, Convolution):
        _convolution(node, links)
    elif isinstance(rule, Linear):
        _contract(node, -1, -1, links)
    elif isinstance(rule, (Elementwise, BatchNorm)) and _rank(node):
        _aligned(node, 1 if isinstance(rule, (BatchNorm, PRelu)) else None, links)
    elif isinstance(rule, LayerNorm) and len(arg(node, "normalized_shape")) == 1:
        _aligned(node, -1, links)
    elif isinstance(rule, AveragePool):
        for dim in range(_rank(node) - rule.spatial):
            links.tie(node, dim, x, dim)
        for n in (node, x):
            links.pin(n, range(_rank(n) - rule.spatial, _rank(n)), f"{operator_name(node)} reads neighbours")
    elif isinstance(rule, Reduction):
        _reduction(node, x, links)
    elif node.target in _FLATTENS and _flattens(node, x):
        links.tie(node, 0, x, 0)
        links.pin(x, range(2, _rank(x)), f"{operator_name(node)} ({owner(node)}) puts its positions side by side")
        links.flattened.append(((node, 1), (x, 1), math.prod(concrete(x)[2:])))
    elif node.target in _PASSING and _rank(node):
        _pass_on(node, links)
    else:
        links.pin_all([node, *node.all_input_nodes], f"{operator_name(node)} ({owner(node)}) tells channels apart")


def _convolution(node: fx.Node, links: _Links) -> None:
    x, w = node.args[0], node.args[1]
    assert isinstance(x, fx.Node)
    assert isinstance(w, fx.Node)
    channel, groups = _rank(node) - _rank(w) + 1, arg(node, "groups")
    links.pin(node, range(channel + 1, _rank(node)), "positions")
    links.pin(x, range(channel + 1, _rank(x)), "positions")
    links.pin(w, range(2, _rank(w)), "taps")
    if groups == 1:
        _contract(node, channel, channel, links)
    elif _shape(w)[1] == 1 and groups == _shape(w)[0]:
        links.tie(x, channel, node, channel)
        _rows(node, channel, links)
    else:
        links.pin_all([node, x, w], f"grouped convolution {owner(node)}")


def _contract(node: fx.Node, x_dim: int, out_dim: int, links: _Links) -> None:
    x, w = node.args[0], node.args[1]
    assert isinstance(x, fx.Node)
    assert isinstance(w, fx.Node)
    if w.op != "get_attr":
        links.pin_all([node, *node.all_input_nodes], f"the weight of {owner(node)} is computed")
        return
    links.tie(x, x_dim, w, 1)
    _rows(node, out_dim, links)
    for dim in range(x_dim % _rank(x)):
        links.tie(x, dim, node, dim)


def _rows(node: fx.Node, dim: int, links: _Links) -> None:
    links.tie(node, dim, node.args[1], 0)  # type: ignore[arg-type]
    bias = arg(node, "bias")
    if isinstance(bias, fx.Node):
        links.tie(node, dim, bias, 0)


def _aligned(node: fx.Node, channel: int | None, links: _Links) -> None:
    """Elementwise with broadcasting; vectors of one number per channel, as norms have, lie along `channel`."""
    for n in node.all_input_nodes:
        offset = _rank(node) - _rank(n)
        if channel is not None and n is not node.args[0]:
            # not one for all, as PReLU may have; which lies along dimension 1 where there is one
            if channel < _rank(node) and _shape(n) == [_shape(node)[channel]]:
                links.tie(n, 0, node, channel)
            continue
        for dim, size in enumerate(_shape(n)):
            if size == _shape(node)[dim + offset]:
                links.tie(n, dim, node, dim + offset)


def _reduction(node: fx.Node, x: fx.Node, links: _Links) -> None:
    dims = arg(node, "dim")
    reduced = {d % _rank(x) for d in ([dims] if isinstance(dims, int) else dims)} if dims else set(range(_rank(x)))
    if node.target in Reduction.positions:
        links.pin(x, reduced, f"{operator_name(node)} ({owner(node)}) returns the number of a channel")
    position = 0
    for dim in range(_rank(x)):
        if dim not in reduced:
            links.tie(x, dim, node, dim if arg(node, "keepdim") else position)
            position += 1


def _pass_on(node: fx.Node, links: _Links) -> None:
    """Movement: a dimension that comes through whole and in order is tied; the others are pinned."""
    reason = f"{operator_name(node)} ({owner(node)}) tells channels apart"
    passed: set[Axis] = set()
    for x in node.all_input_nodes:
        if _rank(x):
            for dim, to in _same_dims(node, x):
                links.tie(x, dim, node, to)
                passed |= {(x, dim), (node, to)}
    for n in [node, *node.all_input_nodes]:
        links.pin(n, [d for d in range(_rank(n)) if (n, d) not in passed], reason)


def _same_dims(node: fx.Node, x: fx.Node) -> list[tuple[int, int]]:
    """Dimensions of `x` that are dimensions of the result, index by index."""
    rank = _rank(x)
    if node.target is aten.permute.default:
        return [(d % rank, i) for i, d in enumerate(arg(node, "dims"))]
    if node.target is aten.transpose.int:
        a, b = arg(node, "dim0") % rank, arg(node, "dim1") % rank
        return [(d, {a: b, b: a}.get(d, d)) for d in range(rank)]
    if node.target in (aten.cat.default, aten.slice.Tensor):
        return [(d, d) for d in range(rank) if d != arg(node, "dim") % rank]
    if node.target is aten.select.int:
        gone = arg(node, "dim") % rank
        return [(d, d - (d > gone)) for d in range(rank) if d != gone]
    if node.target is aten.unsqueeze.default:
        new = arg(node, "dim") % (rank + 1)
        return [(d, d + (d >= new)) for d in range(rank)]
    if node.target is aten.expand.default:
        new = _rank(node) - rank
        return [(d, d + new) for d in range(rank) if _shape(x)[d] == _shape(node)[d + new]]
    return _kept_by_reshape(_shape(x), _shape(node))


def _kept_by_reshape(before: list[Any], after: list[Any]) -> list[tuple[int, int]]:
    """Dimensions of one size with as many elements before and behind them on both sides."""
    ends = {(_elements(after[:j]), size): j for j, size in enumerate(after) if isinstance(size, int) and size > 1}
    known = [(i, size) for i, size in enumerate(before) if isinstance(size, int)]
    found = [(i, ends.get((_elements(before[:i]), size))) for i, size in known]
    return [(i, j) for i, j in found if j is not None]


def _elements(sizes: list[Any]) -> object:
    """Their product, with the symbols in it: a batch that is moved past is seen, and so is one merged with a size."""
    return math.prod(size if isinstance(size, int) else size.node.expr for size in sizes)


def _flattens(node: fx.Node, x: fx.Node) -> bool:
    """[N, C, ...] to [N, C * ...], of more than one C."""
    before, after = _shape(x), _shape(node)
    known = all(isinstance(size, int) for size in [*before[1:], *after[1:]])
    return len(after) == 2 and len(before) > 2 and before[1] != 1 and known and math.prod(concrete(x)[1:]) == after[1]
