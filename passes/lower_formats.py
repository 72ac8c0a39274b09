"""Layers with a format become its operator on packed weights.

    conv2d(x, w, b) -> permute(shuffled_block(contiguous(permute(x)), packed w, b))     channels last inside
    linear(x, w, b) -> shuffled_block(contiguous(x), packed w, b)

Two such convolutions in a row leave no copy between them: the permutes cancel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from fxsparse.formats.shuffled_block import ShuffledBlock, pack
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import arg, aten, get_tensor, new_weight
from fxsparse.passes.choose_formats import FORMAT, GROUPS
from fxsparse.passes.context import Context

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per layer that `choose_formats` gave a format."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and FORMAT in node.meta:
            name = str(cast(fx.Node, node.args[1]).target)
            packed = pack(get_tensor(gm, name), node.meta[GROUPS])
            rows = "in order" if packed.in_order else "scattered"
            what = f"{packed.groups} row groups, {packed.nse} stored elements, rows {rows}"
            data = {"node": node, "packed": packed}
            found.append(Decision("lower_formats", name, what, f"chosen: {node.meta[FORMAT]}", data=data))
    return found


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Replace one layer."""
    node = cast(fx.Node, decision.data["node"])
    packed = cast(ShuffledBlock, decision.data["packed"])
    x, is_conv = cast(fx.Node, node.args[0]), node.target is aten.conv2d.default
    geometry = [_pair(arg(node, n)) for n in ("stride", "padding", "dilation")] if is_conv else [[1, 1], [0, 0], [1, 1]]
    tensors = [_stored(gm, node, decision.where, name, packed) for name in packed.names]
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function
        inside = call(aten.contiguous.default, (call(aten.permute.default, (x, TO_LAST)) if is_conv else x,))
        sizes: tuple[Any, ...] = (packed.shape[0], packed.kernel, *geometry, "none")
        y = call(shuffled_block, (inside, *tensors, arg(node, "bias"), None, *sizes))
        result = call(aten.permute.default, (y, TO_FIRST)) if is_conv else y
    for new in (inside, y, result, *inside.all_input_nodes):
        if "nn_module_stack" in node.meta and new is not x:
            new.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _stored(gm: fx.GraphModule, node: fx.Node, weight: str, name: str, packed: ShuffledBlock) -> fx.Node:
    tensor = getattr(packed, name).to(get_tensor(gm, weight).device)
    if name == "values":  # the kernels multiply in float32, whatever the activations are
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return new_weight(gm, node, f"{weight}_{name}", tensor)


def _pair(value: int | list[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))
