"""One dialect: every value is one tensor, weights are constants with one reader each.

- inference batch norm (three results) becomes batch_norm (one)
- split, split_with_sizes, chunk and unbind become slices and selections
- dropout outside training, alias, detach, contiguous and no-op clones go
- cat lets go of tensors that hold nothing (an empty cache)
- view becomes reshape: once copies are gone its strides may not allow a view
- what depends on no input is computed now (weight norm, transposed weights, attention masks)
- a weight that several nodes read gets one get_attr node for each, so that each can be cut differently

All of it is exact. `shrink_channels` and the rules then need to know one form of each operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import (
    arg,
    aten,
    free_name,
    get_tensor,
    new_weight,
    operator_name,
    owner,
)
from fxsparse.ir.symbols import rank_of, symbolic_dims
from fxsparse.passes.context import Context

_IDENTITY = (
    aten.dropout.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
    aten.lift_fresh_copy.default, aten.clone.default, aten.feature_dropout.default, aten.alpha_dropout.default,
)  # fmt: skip
_SPLIT = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
_VIEW = (aten.view.default, aten._unsafe_view.default)
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default
_LARGEST_CONSTANT_BYTES = 2**28  # computing a constant must not blow the model up


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per node to rewrite."""
    decisions = [_decide(node) for node in gm.graph.nodes if node.op == "call_function"]
    return [d for d in decisions if d is not None] + list(_constants(gm)) + list(_shared(gm))


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Carry out one decision."""
    rewrite = cast(Callable[[fx.GraphModule, fx.Node], None], decision.data["rewrite"])
    rewrite(gm, decision.data["node"])


def _decide(node: fx.Node) -> Decision | None:
    if node.target in _IDENTITY and not _in_training(node) and not _lays_out(node):
        return _accept(node, f"drop {operator_name(node)}", "it is the identity at inference", _drop)
    if node.target in _VIEW:
        return _accept(node, "write view as reshape", "it holds for any strides", _write_reshape)
    if node.target is _BATCH_NORM and all(_is_item(user) for user in node.users):
        return _accept(node, "write as batch_norm", "one result instead of three", _write_batch_norm)
    if node.target is aten.cat.default and any(map(_is_nothing, node.all_input_nodes)):
        return _accept(node, "drop what holds nothing", "cat passes over tensors of shape [0]", _drop_nothing)
    if node.target in _SPLIT and not _splits_symbolic(node) and all(_is_item(user) for user in node.users):
        return _accept(node, f"write {operator_name(node)} as slices", "one result instead of several", _write_slices)
    return None


def _accept(node: fx.Node, what: str, why: str, rewrite: Callable[[fx.GraphModule, fx.Node], None]) -> Decision:
    return Decision("canonicalize", owner(node), what, why, data={"node": node, "rewrite": rewrite})


def _in_training(node: fx.Node) -> bool:
    return "dropout" in operator_name(node) and bool(arg(node, "train"))


def _lays_out(node: fx.Node) -> bool:
    """Whether it gives one of our own operators the memory layout it reads."""
    return any(getattr(user.target, "namespace", "") == "fxsparse" for user in node.users)


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _is_nothing(node: fx.Node) -> bool:
    """Of shape [0], which `cat` allows beside tensors of any rank: an empty cache."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and list(value.shape) == [0]


def _splits_symbolic(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    return arg(node, "dim") % rank_of(source) in symbolic_dims(source)


def _drop(gm: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(cast(fx.Node, node.args[0]))
    gm.graph.erase_node(node)


def _write_reshape(gm: fx.GraphModule, node: fx.Node) -> None:
    node.target = aten.reshape.default


def _drop_nothing(gm: fx.GraphModule, node: fx.Node) -> None:
    tensors = cast("list[fx.Node]", node.args[0])
    node.args = ([n for n in tensors if not _is_nothing(n)] or tensors[:1], *node.args[1:])


def _write_batch_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    x, gamma, beta, mean, var = node.args[:5]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(
            aten.batch_norm.default, (x, gamma, beta, mean, var, False, 0.0, arg(node, "eps"), False)
        )
    new.meta.update(node.meta)
    for item in list(node.users):
        if item.args[1] == 0:
            new.meta["val"] = item.meta["val"]
            item.replace_all_uses_with(new)
        gm.graph.erase_node(item)
    gm.graph.erase_node(node)


def _write_slices(gm: fx.GraphModule, node: fx.Node) -> None:
    x, dim = cast(fx.Node, node.args[0]), cast(int, arg(node, "dim"))
    starts = [0]
    for part in node.meta["val"]:
        starts.append(starts[-1] + (1 if node.target is aten.unbind.int else part.shape[dim]))
    for item in list(node.users):
        i = cast(int, item.args[1]) % (len(starts) - 1)
        with gm.graph.inserting_before(item):
            if node.target is aten.unbind.int:
                new = gm.graph.call_function(aten.select.int, (x, dim, i))
            else:
                new = gm.graph.call_function(aten.slice.Tensor, (x, dim, starts[i], starts[i + 1]))
        new.meta.update({**node.meta, "val": item.meta["val"]})
        item.replace_all_uses_with(new)
        gm.graph.erase_node(item)
    gm.graph.erase_node(node)


def _constants(gm: fx.GraphModule) -> Iterator[Decision]:
    """The last nodes of every sub-graph that reads weights only."""
    constant: set[fx.Node] = {n for n in gm.graph.nodes if n.op == "get_attr"}
    for node in gm.graph.nodes:
        if node.op == "call_function" and _is_constant(node, constant):
            constant.add(node)
    for node in constant:
        last = any(user not in constant for user in node.users)
        if node.op == "call_function" and last and node.target not in _IDENTITY:
            yield _accept(node, "compute it now", "it depends on no input", _compute)


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return False
    pure = all(n in constant for n in node.all_input_nodes) and not _is_random(node)
    return pure and value.numel() * value.element_size() <= _LARGEST_CONSTANT_BYTES


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _compute(gm: fx.GraphModule, node: fx.Node) -> None:
    with torch.no_grad():
        value = _evaluate(gm, node, {})
    constant = new_weight(gm, node, _constant_name(gm, node), value.contiguous())
    constant.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(constant)
    gm.graph.erase_node(node)
    _unshare(gm, constant)


def _constant_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """The name of the largest tensor it is made of; `conv.weight` for what prune makes of `conv.weight_orig`."""
    sources = [n for n in _ancestors(node) if n.op == "get_attr"]
    if not sources:
        return free_name(gm, f"{owner(node)}.{operator_name(node)}")
    largest = max(sources, key=lambda n: (get_tensor(gm, str(n.target)).numel(), str(n.target).endswith("_orig")))
    return free_name(gm, str(largest.target).removesuffix("_orig"))


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    for n in node.all_input_nodes:
        yield n
        yield from _ancestors(n)


def _evaluate(gm: fx.GraphModule, node: fx.Node, done: dict[fx.Node, Any]) -> Tensor:
    if node not in done:
        if node.op == "get_attr":
            done[node] = get_tensor(gm, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(gm, n, done))
            done[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
    return cast(Tensor, done[node])


def _shared(gm: fx.GraphModule) -> Iterator[Decision]:
    for node in gm.graph.nodes:
        if node.op == "get_attr" and len(node.users) > 1:
            what = f"read {node.target} at {len(node.users)} places by a node of its own"
            yield _accept(node, what, "each use can then be cut by itself", _unshare)


def _unshare(gm: fx.GraphModule, node: fx.Node) -> None:
    for user in list(node.users)[1:]:
        with gm.graph.inserting_before(user):
            copy = gm.graph.get_attr(str(node.target))
        copy.meta.update(node.meta)
        user.replace_input_with(node, copy)


__all__ = ["apply", "plan"]
