"""Layers with a format become its operator on packed weights; the format itself says how."""

from __future__ import annotations

from typing import cast

from torch import fx

from fxsparse.formats import FORMATS
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import get_tensor
from fxsparse.passes.choose_formats import FORMAT, GROUPS
from fxsparse.passes.context import Context


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per layer that was given a format."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.meta.get(FORMAT):
            name = str(cast(fx.Node, node.args[1]).target)
            packed = FORMATS[node.meta[FORMAT]].pack(get_tensor(gm, name), node.meta[GROUPS])
            data = {"node": node, "packed": packed}
            found.append(Decision("lower_formats", name, str(packed), f"chosen: {node.meta[FORMAT]}", data=data))
    return found


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Replace one layer."""
    node = cast(fx.Node, decision.data["node"])
    before = set(gm.graph.nodes)
    result = FORMATS[node.meta[FORMAT]].lower(gm, node, decision.data["packed"])
    for new in set(gm.graph.nodes) - before:
        new.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
