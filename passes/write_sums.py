"""The means that `write_means` wrote as products with a stored row, as sums: x (r, ..., r) = r sum(x)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, fx

from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import arg, aten, call_for, new_weight, owner, weight_of
from fxsparse.passes.context import Context
from fxsparse.passes.write_means import MEAN


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per product."""
    what, why = "write linear as a sum", "its row is a mean's"
    found = (n for n in gm.graph.nodes if n.op == "call_function" and MEAN in n.meta)
    return [Decision("write_sums", owner(n), what, why, data={"node": n}) for n in found]


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Where some channels count and others, still there, do not, they are multiplied first."""
    node = cast(fx.Node, decision.data["node"])
    x, bias = cast(fx.Node, node.args[0]), arg(node, "bias")
    row = cast(Tensor, weight_of(gm, node.args[1]))[0]
    alike = bool((row == row[0]).all())
    if not alike:
        factor = new_weight(gm, node, f"{owner(node)}.row", row.clone())
    with gm.graph.inserting_before(node):
        counted = x if alike else call_for(gm, node, aten.mul.Tensor, x, factor)
        y = call_for(gm, node, aten.sum.dim_IntList, counted, [-1], True)
        y = call_for(gm, node, aten.mul.Scalar, y, float(row[0])) if alike else y
        y = y if bias is None else call_for(gm, node, aten.add.Tensor, y, bias)
    node.replace_all_uses_with(y)
    gm.graph.erase_node(node)
