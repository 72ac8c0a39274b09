"""Packed layers as they run best on a GPU.

Graphs keep the operators of the formats, which run anywhere and can be saved; what is made for this GPU is put in where
a graph is lowered.

A linear layer of shuffled blocks reads and writes [features, tokens] there. Elementwise operators between two of them
can run in that layout. What else makes its x, or reads its y, has features last: a norm that wrote one token's features
would store each to a line of its own, so a kernel of ours turns the matrix in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from fxsparse.formats import semi_structured, shuffled_block_gpu
from fxsparse.formats.n_m_op import n_m
from fxsparse.formats.shuffled_block_few import has_few
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.formats.turned import turned
from fxsparse.ir.graph import arg, aten, call_nodes, erase_unused, flat, on_gpu
from fxsparse.ir.union_find import UnionFind


class Turns(NamedTuple):
    """What a packed linear layer has turned: a share of its x, which other such layers may read too, and its y."""

    x: float
    y: bool


def placed(gm: fx.GraphModule) -> fx.GraphModule:
    """A flat clone of `gm` as it runs where its weights are."""
    return for_gpu(flat(gm)) if on_gpu(gm) else flat(gm)


def for_gpu(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with its packed linear layers replaced, in place."""
    lowered = {shuffled_block: shuffled_block_gpu.lower}
    if torch.backends.cusparselt.is_available():
        lowered[n_m] = semi_structured.lower
    for node in call_nodes(gm, *lowered):
        if len(cast(Any, arg(node, "shape"))) == 2:
            node.replace_all_uses_with(lowered[cast(Any, node.target)](gm, node))
            gm.graph.erase_node(node)
    erase_unused(gm)  # users that are none would be turned for
    _settle(gm)
    erase_unused(gm)
    return gm


def _settle(gm: fx.GraphModule) -> None:
    """Decide for every call of `transposed` where its x and y are turned, in place."""
    call: Any = gm.graph.call_function
    calls = list(call_nodes(gm, shuffled_block_gpu.transposed))
    results = {u: n for n in calls for u in n.users if u.target is aten.movedim.int}
    inputs = {cast(fx.Node, cast(fx.Node, n.args[0]).args[0]): n for n in calls}  # movedim(x, -1, 0), of each call
    between = _between(gm, results, inputs)
    firsts: dict[fx.Node, fx.Node] = {}
    for first, layer in inputs.items():
        x = cast(fx.Node, first.args[0])
        if x in between or x in results:
            continue
        if x not in firsts:
            with gm.graph.inserting_before(first):
                firsts[x] = call(turned, (x, True))
        layer.args = (firsts[x], *layer.args[1:])
    for last, layer in results.items():
        others = [u for u in last.users if u not in between and u not in inputs]
        if others:
            with gm.graph.inserting_before(last):
                y = call(turned, (layer, False))
            for user in others:
                user.replace_input_with(last, y)


def turns(gm: fx.GraphModule, layers: Collection[fx.Node]) -> dict[fx.Node, Turns]:
    """What will be turned around these linear layers, if they and no others are packed in shuffled blocks.

    Layers of few tokens are left out: nothing is turned there.
    """
    layers = [layer for layer in layers if not has_few(layer)]
    between = _between(gm, layers, layers)
    readers = Counter(layer.args[0] for layer in layers)

    def of(layer: fx.Node) -> Turns:
        x = cast(fx.Node, layer.args[0])
        first = 0.0 if x in between or x in layers else 1 / readers[x]
        return Turns(first, any(u not in between and u not in layers for u in layer.users))

    return {layer: of(layer) for layer in layers}


def together(gm: fx.GraphModule, layers: Collection[fx.Node]) -> list[list[fx.Node]]:
    """The same layers, put together where one's turns depend on whether another is packed. In the order given."""
    between, same = _between(gm, layers, layers), UnionFind[fx.Node]()
    for layer in layers:
        same.unite(cast(fx.Node, layer.args[0]), layer)  # who reads the same shares a turn
    for node in between:
        for other in node.all_input_nodes:
            same.unite(node, other)
    found: dict[fx.Node, list[fx.Node]] = {}
    for layer in layers:
        found.setdefault(same.root(layer), []).append(layer)
    return list(found.values())


def _between(gm: fx.GraphModule, results: Collection[fx.Node], inputs: Collection[fx.Node]) -> set[fx.Node]:
    """Elementwise operators that read nothing but `results` and one another, and are read by nothing but `inputs`."""
    left = {n for n in gm.graph.nodes if n.op == "call_function" and _elementwise(n.target)}

    def stays(node: fx.Node) -> bool:
        from_layers = [a for a in node.all_input_nodes if a in left or a in results]
        rest = [a for a in node.all_input_nodes if a not in from_layers]
        return bool(from_layers) and not rest and all(u in left or u in inputs for u in node.users)

    while gone := {n for n in left if not stays(n)}:
        left -= gone
    return left


def _elementwise(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
