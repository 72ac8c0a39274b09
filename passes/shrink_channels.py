"""Cut every dimension to the indices that are needed.

The smallest layout is found first (`fxsparse.analysis.closure`), for the whole graph at once, since elementwise
operators, residual additions, concatenations and reshapes force dimensions to share one numbering. Then each weight is
indexed by it, and each literal size in the graph (view, expand, slice, groups) is rewritten. Widths are rounded up to
a multiple of 16 (keeping dead channels is exact) where that was *measured* to be faster on this machine.

Every decision here is one weight or one operator; together they are one consistent cut, and fake shapes are
propagated afterwards, which catches a wrong size without data.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, fx

from fxsparse.analysis.closure import smallest_layout
from fxsparse.analysis.reasons import columns_kept, is_layer, rows_kept
from fxsparse.analysis.sweep import analyze
from fxsparse.ir.decision import Decision
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import get_tensor, operator_name, owner, replace_weight, set_arg
from fxsparse.ir.layout import Layout
from fxsparse.passes.context import Context
from fxsparse.passes.round_widths import round_widths
from fxsparse.rules import rule_of


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per weight or operator whose sizes change, one refusal per reason that dead rows or columns stay."""
    facts = analyze(gm, known=ctx.facts)  # fold_constants changed weights, not values
    layout = smallest_layout(gm, facts)
    if ctx.time_layer is not None:
        layout = round_widths(gm, facts, layout, ctx)
    ctx.facts, ctx.layout = facts, layout
    return [d for node in gm.graph.nodes if node in layout.kept for d in _decide(node, facts, layout)]


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Index one weight, or rewrite the literals of one operator."""
    node = cast(fx.Node, decision.data["node"])
    for name, value in decision.data.get("arguments", {}).items():
        set_arg(node, name, value)
    indices = cast("dict[int, Tensor]", decision.data.get("indices", {}))
    if indices:
        weight = get_tensor(gm, str(node.target))
        for dim, index in indices.items():
            weight = weight.index_select(dim, index.to(weight.device))
        replace_weight(gm, node, weight.contiguous())


def _decide(node: fx.Node, facts: Facts, layout: Layout) -> list[Decision]:
    if node.op == "get_attr":
        return _cut_weight(node, layout)
    if node.op != "call_function":
        return []
    decisions = _refusals(node, facts, layout) if is_layer(node) else []
    arguments = rule_of(node).rewrite(node, facts, layout)
    if arguments:
        what = f"rewrite {operator_name(node)}: " + ", ".join(f"{k} = {_short(v)}" for k, v in arguments.items())
        data = {"node": node, "arguments": arguments}
        decisions.append(Decision("shrink_channels", owner(node), what, "fewer channels", data=data))
    return decisions


def _refusals(layer: fx.Node, facts: Facts, layout: Layout) -> list[Decision]:
    """What could go by itself and stays."""
    weight = cast(fx.Node, layer.args[1])
    kinds = (("rows", rows_kept(layer, facts, layout), 0), ("columns", columns_kept(layer, facts, layout), 1))
    return [
        Decision(
            "shrink_channels", str(weight.target), f"remove {count} of {layout.shape(weight)[dim]} {kind}", why, False
        )
        for kind, reasons, dim in kinds
        for why, count in reasons.items()
    ]


def _short(value: object) -> str:
    text = str([str(v) for v in value] if isinstance(value, list) else value).replace("'", "")
    return text if len(text) <= 60 else text[:57] + "..."


def _cut_weight(node: fx.Node, layout: Layout) -> list[Decision]:
    shape, new = layout.shape(node), layout.new_shape(node)
    if new == shape:
        return []
    indices = {d: layout.indices(node, d) for d in range(len(shape)) if new[d] != shape[d]}
    kinds = [f"{shape[d] - new[d]} of {shape[d]} {'rows' if d == 0 else 'columns'}" for d in indices]
    data = {"node": node, "indices": indices}
    what = f"remove {' and '.join(kinds)}"
    return [Decision("shrink_channels", str(node.target), what, "no output depends on them", data=data)]
