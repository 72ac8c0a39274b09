"""Normalization over channels that are always 0, as the linear algebra it is, so that these channels can go.

    mean(x) = x (1/N, ..., 1/N)
    layer_norm(x) = c / sqrt(mean(c^2) + eps) gamma + beta,  c = x - mean(x)

A normalization divides by the number of all channels, so it cannot simply be cut. Written as a product with a stored
row it can: `fold_constants` clears what stands under known channels, `shrink_channels` cuts it, and N stays what it
was. A channel whose x and gamma are 0 has c = -mean(x) in a layer norm: k of them add k/N mean(x)^2 to mean(c^2).
This is what pruning the width of a transformer leaves (Sheared LLaMA, arXiv 2310.06694; Minitron, arXiv 2407.14679).

Only over the last dimension, and only where channels really go by it; half precision is computed in float32.
`write_sums` makes sums of what is left of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.analysis.closure import smallest_layout
from fxsparse.analysis.sweep import analyze, known_values
from fxsparse.ir.decision import Decision
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import (
    arg,
    aten,
    call_for,
    call_nodes,
    clone,
    new_weight,
    operator_name,
    owner,
    refresh,
    weight_of,
)
from fxsparse.ir.layout import Layout
from fxsparse.ir.symbols import rank_of
from fxsparse.passes import fold_constants
from fxsparse.passes.context import Context
from fxsparse.passes.pipeline import run

MEAN = "fxsparse_mean"  # a key of node.meta: this linear node is a mean
_HALF = (torch.float16, torch.bfloat16)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per normalization of which some channels are known."""
    candidates = [n for n in call_nodes(gm, aten.mean.dim, *_NORMS) if _over_last(n)]
    if not candidates:
        return []
    facts = known_values(gm)
    found = [d for node in candidates if (d := _decide(gm, node, facts)) is not None]
    refused: list[Decision] = []
    while found:  # what is refused keeps its channels, and perhaps those of others
        tried = _with_gain(gm, found)
        found = [d for d in tried if d.accepted]
        refused += [d for d in tried if not d.accepted]
        if len(found) == len(tried):
            break
    return found + refused


def _with_gain(gm: fx.GraphModule, decisions: list[Decision]) -> list[Decision]:
    """Those after which channels really go are accepted; found out on a copy of the graph."""
    copy = clone(gm)
    nodes = {n.name: n for n in copy.graph.nodes}
    means = [apply(copy, replace(d, data={**d.data, "node": nodes[d.data["node"].name]})) for d in decisions]
    refresh(copy)
    ctx = Context()
    run(copy, [fold_constants], ctx)
    layout = smallest_layout(copy, analyze(copy, known=ctx.facts))
    reasons = [_why_not(mean, layout) for mean in means]
    return [replace(d, why=why, accepted=False) if why else d for d, why in zip(decisions, reasons, strict=True)]


def _why_not(mean: fx.Node, layout: Layout) -> str:
    """Why no channel of a mean goes; empty where some do."""
    if mean not in layout.kept:
        return "nothing that depends on the input reads it"
    row = cast(fx.Node, mean.args[1])
    return next(iter(layout.why(row, 1)), "something else needs all channels") if layout.full(row, 1) else ""


def apply(gm: fx.GraphModule, decision: Decision) -> fx.Node:
    """Put the operators in the place of the one. Returns the first of the products."""
    node = cast(fx.Node, decision.data["node"])
    write = _Writer(gm, node, cast(Tensor, decision.data["dead"]), cast(torch.dtype, decision.data["dtype"]))
    with gm.graph.inserting_before(node):
        result = _WRITE[node.target](write)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return write.means[0]


def _over_last(node: fx.Node) -> bool:
    x = cast(fx.Node, node.args[0])
    value = x.meta["val"]
    if not value.is_floating_point() or not value.dim() or not isinstance(value.shape[-1], int):
        return False
    if node.target in _NORMS:
        stored = all(n.op == "get_attr" for n in node.all_input_nodes[1:])
        return len(arg(node, "normalized_shape")) == 1 and stored
    dims = arg(node, "dim")
    return arg(node, "dtype") is None and dims is not None and [d % rank_of(x) for d in dims] == [rank_of(x) - 1]


def _decide(gm: fx.GraphModule, node: fx.Node, facts: Facts) -> Decision | None:
    value = cast(fx.Node, node.args[0]).meta["val"]
    channels = facts.summary(cast(fx.Node, node.args[0]), -1)
    dead, zero = channels.constant, channels.value == 0
    if node.target in _NORMS:
        gamma = weight_of(gm, arg(node, "weight"))
        gone = torch.zeros_like(dead) if gamma is None else gamma == 0
        dead = dead & (zero & gone if node.target is aten.layer_norm.default else zero | gone)
    if not dead.any() or dead.all():
        return None
    what = f"write {operator_name(node)} as products"
    why = f"{int(dead.sum())} of {len(dead)} channels do not depend on the input"
    return Decision("write_means", owner(node), what, why, data={"node": node, "dead": dead, "dtype": value.dtype})


class _Writer:
    """Writes operators in the place of `node`, whose first input is `x`, in float32 where that is half precision."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, dead: Tensor, dtype: torch.dtype) -> None:
        self.gm, self.node, self.dead, self.dtype = gm, node, dead, dtype
        self.wide = torch.float32 if dtype in _HALF else dtype
        self.means: list[fx.Node] = []

    @property
    def x(self) -> fx.Node:
        """What is normalized."""
        return self.cast(cast(fx.Node, self.node.args[0]), self.wide)

    def call(self, op: Any, *args: Any) -> fx.Node:
        return call_for(self.gm, self.node, op, *args)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        if self.wide is self.dtype:
            return x
        y = self.call(aten._to_copy.default, x)
        y.kwargs = {"dtype": dtype}
        return y

    def mean(self, x: fx.Node, but: Tensor | None = None) -> fx.Node:
        """[..., 1]: the sum of all channels, `but` some, divided by the number of all."""
        row = torch.full((1, len(self.dead)), 1 / len(self.dead), dtype=self.wide, device=self.dead.device)
        row = row if but is None else row.masked_fill(but, 0)
        weight = new_weight(self.gm, self.node, f"{owner(self.node)}.mean", row)
        y = self.call(aten.linear.default, x, weight)
        y.meta[MEAN] = True
        self.means.append(y)
        return y

    def scaled(self, x: fx.Node, square: fx.Node) -> fx.Node:
        """X / sqrt(square + eps) gamma + beta, in the dtype of `node`."""
        eps = arg(self.node, "eps")
        eps = torch.finfo(self.wide).eps if eps is None else eps  # as in PyTorch, for half precision too
        y = self.call(aten.mul.Tensor, x, self.call(aten.rsqrt.default, self.call(aten.add.Scalar, square, eps)))
        for name, op in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
            known = any(p.name == name for p in cast(Any, self.node.target)._schema.arguments)
            if known and (stored := arg(self.node, name)) is not None:
                own = self.gm.graph.node_copy(stored)  # one tensor may be gamma and beta, and each reader has a node
                y = self.call(op, y, own)
        return self.cast(y, self.dtype)


def _mean(write: _Writer) -> fx.Node:
    y = write.cast(write.mean(write.x), write.dtype)
    return y if arg(write.node, "keepdim") else write.call(aten.select.int, y, -1, 0)


def _rms_norm(write: _Writer) -> fx.Node:
    x = write.x
    return write.scaled(x, write.mean(write.call(aten.mul.Tensor, x, x)))


def _layer_norm(write: _Writer) -> fx.Node:
    x = write.x
    mean = write.mean(x, but=write.dead)
    c = write.call(aten.sub.Tensor, x, mean)
    square = write.mean(write.call(aten.mul.Tensor, c, c), but=write.dead)
    rest = write.call(aten.mul.Scalar, write.call(aten.mul.Tensor, mean, mean), float(write.dead.double().mean()))
    return write.scaled(c, write.call(aten.add.Tensor, square, rest))


_WRITE: dict[Any, Callable[[_Writer], fx.Node]] = {
    aten.mean.dim: _mean, aten.layer_norm.default: _layer_norm, aten.rms_norm.default: _rms_norm,
}  # fmt: skip
