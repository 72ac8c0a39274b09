"""The smallest layout that holds everything demanded and that every operator can be cut to.

Rules only ever add indices, so repeating them until nothing grows ends, and its end does not depend on the order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import fx

from fxsparse.analysis.sweep import RuleOf
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import aten
from fxsparse.ir.layout import Layout, around
from fxsparse.ir.symbols import symbolic_dims
from fxsparse.rules import rule_of
from fxsparse.rules.movement import Movement


def smallest_layout(gm: fx.GraphModule, facts: Facts, *, rule_of: RuleOf = rule_of) -> Layout:
    """The layout to cut `gm` to. `facts` need the backward sweep."""
    layout = Layout({n: tuple(bits.shape) for n, bits in facts.unknown.items()})
    for node, bits in facts.demanded.items():
        if node.op == "call_function":
            layout.grow_elements(node, bits.cpu(), "")
    _pin_signature(gm, layout)
    close(gm, facts, layout, rule_of=rule_of)
    return layout


def close(
    gm: fx.GraphModule,
    facts: Facts,
    layout: Layout,
    *,
    grown: Iterable[fx.Node] | None = None,
    rule_of: RuleOf = rule_of,
) -> None:
    """Grow `layout` until every operator can be cut to it and nothing that is read is empty.

    grown  the nodes that have grown since it was last closed; None: it never was
    """
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    waiting, unsettled = set(nodes) if grown is None else around(grown), set[fx.Node]()
    while waiting:
        unsettled |= layout.spread(nodes, waiting, lambda node: _couple(node, facts, layout, rule_of))
        layout.grown.clear()
        _keep_one(gm, layout)
        if not layout.grown:
            for node in (n for n in nodes if n in unsettled and n in layout.kept and _moves(n, facts)):
                if isinstance(rule := rule_of(node), Movement):
                    rule.settle(node, facts, layout)
            unsettled.clear()
        waiting = around(layout.grown)


def _couple(node: fx.Node, facts: Facts, layout: Layout, rule_of: RuleOf) -> None:
    if node in layout.kept and _moves(node, facts):
        rule_of(node).couple(node, facts, layout)
    elif node not in layout.kept and not isinstance(facts.value[node], (int, float, bool)):
        for n in (n for n in node.all_input_nodes if n in layout.kept):
            layout.pin(n, f"{node.name} has several results: everything it reads stays")


def _moves(node: fx.Node, facts: Facts) -> bool:
    """Whether the node reads tensors; one that creates them from nothing is kept whole by who reads it."""
    return node in facts.unknown


def _pin_signature(gm: fx.GraphModule, layout: Layout) -> None:
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node in layout.kept:
            layout.pin(node, "input signature")
        elif node.op == "output":
            for n in node.all_input_nodes:
                if n in layout.kept:
                    layout.pin(n, "output signature")
        elif node in layout.kept:
            layout.pin(node, "", symbolic_dims(node))


def _keep_one(gm: fx.GraphModule, layout: Layout) -> None:
    """A value that is still read must not become empty; `cat` can drop the inputs of which nothing is kept."""
    read: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output" or node in read:
            read.update(n for n in node.all_input_nodes if not (_is_cat(node) and _empty_along(node, n, layout)))
    for node in (n for n in layout.kept if n in read):
        for dim, kept in enumerate(layout.kept[node]):
            if len(kept) and not kept.any():
                first = torch.zeros_like(kept)
                first[0] = True
                layout.grow(node, dim, first, "one channel stays: a value that is read cannot be empty")


def _is_cat(node: fx.Node) -> bool:
    return node.target is aten.cat.default


def _empty_along(cat: fx.Node, source: fx.Node, layout: Layout) -> bool:
    """Nothing of `source` is kept along the dimension of `cat`, and something of another input is."""
    dim = cast(int, cat.args[1]) if len(cat.args) > 1 else 0
    return not layout.kept[source][dim].any() and bool(layout.kept[cat][dim].any())
