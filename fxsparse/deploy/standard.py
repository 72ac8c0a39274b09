"""A graph in ATen operators alone, as exporters want it: no operators of our own, tensors in and tensors out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.deploy.gathers import merge_gathers
from fxsparse.errors import TargetError
from fxsparse.formats import BY_OPERATOR
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.ir.graph import (
    arg,
    aten,
    call_nodes,
    erase_unused,
    flat,
    operator_name,
    owner,
    refresh,
    weight_of,
)

_SAME = (aten.contiguous.default, aten.alias.default, aten.clone.default)


@dataclass(frozen=True)
class StandardGraph:
    """A graph whose placeholders and outputs are tensors only.

    inputs   which of the flattened inputs it takes; all else was constant
    outputs  the flattened outputs: the number of one of its own, or a constant
    two_four  names of the weights that are 2:4 sparse
    unstructured  how many weights in that format became dense ones, zeros and all
    """

    gm: fx.GraphModule
    inputs: tuple[int, ...]
    outputs: tuple[tuple[bool, Any], ...]
    two_four: tuple[str, ...]
    unstructured: int = 0


def filled(spec: Sequence[tuple[bool, Any]], outputs: Sequence[Any]) -> list[Any]:
    """All flattened outputs, from those that were computed. `spec` as in `StandardGraph.outputs`."""
    return [outputs[value] if computed else value for computed, value in spec]


def standard(gm: fx.GraphModule) -> StandardGraph:
    """A flat clone of `gm` in ATen operators. Raises TargetError for an operator that has no such form."""
    gm = flat(gm)
    unstructured = sum(_is_unstructured(node) for node in gm.graph.nodes)
    expand_formats(gm)
    cancel_permutes(gm)
    refresh(gm)
    merge_gathers(gm)
    two_four = flatten_two_four(gm)
    inputs, outputs = _drop_constant_inputs(gm), _drop_constant_outputs(gm)
    erase_unused(gm)
    gm.graph.lint()
    refresh(gm)
    return StandardGraph(gm, inputs, outputs, two_four, unstructured)


def _is_unstructured(node: fx.Node) -> bool:
    """Its groups are too small for products of their own: `expand` gives the dense layer again."""
    return node.target is shuffled_block and arg(node, "lanes") == "pixels"


def expand_formats(gm: fx.GraphModule) -> None:
    """Operators of the formats become what `Format.expand` makes of them."""
    for node in list(gm.graph.nodes):
        if node.target in BY_OPERATOR:
            before = set(gm.graph.nodes)
            node.replace_all_uses_with(BY_OPERATOR[node.target].expand(gm, node))
            for new in set(gm.graph.nodes) - before:
                new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            gm.graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxsparse":
            raise TargetError(f"operator {operator_name(node)} in {owner(node)}", expected="one in standard operators",
                              got="a format without `expand`", do="Pass formats='dense'.")  # fmt: skip


def cancel_permutes(gm: fx.GraphModule) -> None:
    """permute(permute(x, p), q) = x where q undoes p; copies between them, made for kernels, go too."""
    for node in call_nodes(gm, aten.permute.default):
        inner = node.args[0]
        while isinstance(inner, fx.Node) and inner.target in _SAME:
            inner = inner.args[0]
        if isinstance(inner, fx.Node) and inner.target is aten.permute.default and _undoes(node, inner):
            node.replace_all_uses_with(cast(fx.Node, inner.args[0]))


def _undoes(node: fx.Node, inner: fx.Node) -> bool:
    first, then = (cast("list[int]", n.args[1]) for n in (inner, node))
    return [first[d] % len(first) for d in then] == list(range(len(first)))


def is_two_four(weight: Tensor) -> bool:
    """At most two of four consecutive input channels are nonzero, for every output channel and tap, and some are zero.

    weight  [O, I, ...]; I divides by 4. The rule of NVIDIA's sparse tensor cores.
    """
    if weight.dim() < 2 or weight.shape[1] % 4 or not weight.numel():
        return False
    kept = (weight != 0).unflatten(1, (-1, 4)).sum(2)
    return bool((kept <= 2).all()) and bool((kept > 0).any())


def flatten_two_four(gm: fx.GraphModule) -> tuple[str, ...]:
    """Names of the 2:4 weights. Their linear layers take [M, I]: TensorRT looks for sparse Gemm there."""
    found = []
    for node in call_nodes(gm, aten.linear.default, aten.conv2d.default):
        weight = weight_of(gm, node.args[1])
        if weight is None or not is_two_four(weight):
            continue
        found.append(str(cast(fx.Node, node.args[1]).target))
        if node.target is aten.linear.default and node.meta["val"].dim() != 2:
            _flatten(gm, node)
    return tuple(found)


def _flatten(gm: fx.GraphModule, node: fx.Node) -> None:
    x, val = cast(fx.Node, node.args[0]), node.meta["val"]
    call = gm.graph.call_function
    with gm.graph.inserting_before(node):
        # the first symbolic size is worked out from the others
        symbolic = [d for d, size in enumerate(val.shape[:-1]) if not isinstance(size, int)]
        sizes = [-1 if d in symbolic[:1] else call(aten.sym_size.int, (x, d)) if d in symbolic else size
                 for d, size in enumerate(val.shape)]  # fmt: skip
        rows = call(aten.reshape.default, (x, [-1, x.meta["val"].shape[-1]]))
        result = call(aten.reshape.default, (call(aten.linear.default, (rows, *node.args[1:]), node.kwargs), sizes))
    for new in (rows, result, result.args[0]):
        cast(fx.Node, new).meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _drop_constant_inputs(gm: fx.GraphModule) -> tuple[int, ...]:
    """Numbers of the placeholders that are tensors; what torch.export took for a constant is one from here on."""
    kept = []
    for i, node in enumerate([n for n in gm.graph.nodes if n.op == "placeholder"]):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            kept.append(i)
            continue
        constant = functools.partial(_constant, node, value)
        for user in list(node.users):
            user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), constant)
        gm.graph.erase_node(node)
    return tuple(kept)


def _constant(node: fx.Node, value: Any, found: fx.Node) -> Any:
    return value if found is node else found


def _drop_constant_outputs(gm: fx.GraphModule) -> tuple[tuple[bool, Any], ...]:
    (node,) = (n for n in gm.graph.nodes if n.op == "output")
    values = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
    computed = [v for v in values if isinstance(v, fx.Node)]
    node.args = (tuple(computed),)
    numbers = iter(range(len(computed)))
    return tuple((True, next(numbers)) if isinstance(v, fx.Node) else (False, v) for v in values)
