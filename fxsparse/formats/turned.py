"""Where packed linear layers on a GPU have their tokens side by side, and where they are turned: `fxsparse::turned`.

A layer of `shuffled_block_transposed` reads and writes [features, tokens]. Elementwise operators between two of them
can run in that layout. What else makes its x, or reads its y, has features last: a norm that wrote one token's features
would store each to a line of its own, so a kernel of ours turns the matrix in between.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.formats.operator import LIBRARY, TAGS
from fxsparse.formats.shuffled_block_gpu import transposed
from fxsparse.ir.graph import aten, call_nodes
from fxsparse.kernels.triton import turned as kernel

LIBRARY.define("turned(Tensor x, bool features_first) -> Tensor", tags=TAGS)
turned = torch.ops.fxsparse.turned.default


def settle(gm: fx.GraphModule) -> None:
    """Decide for every call of `transposed` where its x and y are turned, in place."""
    call: Any = gm.graph.call_function
    calls = list(call_nodes(gm, transposed))
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


def reference(x: Tensor, features_first: bool) -> Tensor:
    """Features of x [..., I] first, or of [O, ...] last; on any device and in any dtype."""
    y = x.movedim(-1, 0) if features_first else x.movedim(0, -1)
    return y.clone(memory_format=torch.contiguous_format)


def _cuda(x: Tensor, features_first: bool) -> Tensor:
    if features_first:
        flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
        return kernel(flat).view(x.shape[-1], *x.shape[:-1])
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    return kernel(flat).view(*x.shape[1:], x.shape[0])


def _fake(x: Tensor, features_first: bool) -> Tensor:
    return x.new_empty([x.shape[-1], *x.shape[:-1]] if features_first else [*x.shape[1:], x.shape[0]])


torch.library.register_fake("fxsparse::turned", _fake, lib=LIBRARY)
LIBRARY.impl("turned", reference, "CompositeExplicitAutograd")
LIBRARY.impl("turned", _cuda, "CUDA")
