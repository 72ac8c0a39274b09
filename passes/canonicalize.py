"""One dialect: every value is one tensor, weights are constants with one reader each.

- inference batch norm (three results) becomes batch_norm (one)
- split, split_with_sizes, chunk, unbind and glu become slices and selections
- dropout outside training, alias, detach, contiguous, no-op clones and slices of everything (in `x[:, 0]`) go
- products with a stored matrix [in, out] become linear; an einsum of two tensors becomes the product that it is
- max and min of which nobody reads the positions become amax and amin, adaptive maximum pools pools with equal windows
- padding with a constant has one form, and so has conversion to another dtype
- batch and heads that attention merges and takes apart again are permuted instead
- cat lets go of tensors that hold nothing (an empty cache)
- squeeze leaves the batch alone, where the model does not run on one sample without its dimension
- view becomes reshape: once copies are gone its strides may not allow a view
- what depends on no input is computed now (weight norm, transposed weights, attention masks)
- a weight that several nodes read gets one get_attr node for each, so that each can be cut differently

All of it is exact. `shrink_channels` and the rules then need to know one form of each operator.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import (
    arg,
    aten,
    free_name,
    get_tensor,
    is_ours,
    operator_name,
    owner,
    set_tensor,
)
from fxsparse.ir.symbols import rank_of, squeezes_batch, symbolic_dims
from fxsparse.passes.context import Context
from fxsparse.passes.einsum import Product, product_of, write_product
from fxsparse.passes.forms import (
    PRODUCTS,
    is_extreme,
    is_product,
    splits_heads,
    spreads_bias,
    takes_one_sample,
    write_bias,
    write_conversion,
    write_extreme,
    write_glu,
    write_heads,
    write_linear,
    write_padding,
    write_squeeze,
)

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
    constant = _constant_nodes(gm)
    decisions = [_decide(node, constant) for node in gm.graph.nodes if node.op == "call_function"]
    more = [*_constants(constant), *_shared(gm), *_squeezes(gm)]
    return [d for d in decisions if d is not None] + more


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Carry out one decision."""
    rewrite = cast(Callable[[fx.GraphModule, fx.Node], None], decision.data["rewrite"])
    node = cast(fx.Node, decision.data["node"])
    if not node._erased:  # with what another decision computed
        rewrite(gm, node)


def _decide(node: fx.Node, constant: Collection[fx.Node]) -> Decision | None:
    if node in constant:
        return None
    if node.target in _IDENTITY and not _in_training(node) and not _lays_out(node):
        return _accept(node, f"drop {operator_name(node)}", "it is the identity at inference", _drop)
    if node.target is aten.slice.Tensor and _takes_all(node):
        return _accept(node, "drop slice", "it takes everything", _drop)
    if node.target in PRODUCTS and is_product(node, constant):
        return _accept(node, f"write {operator_name(node)} as linear", "its right side is a weight", _write_linear)
    if spreads_bias(node):
        return _accept(node, "add the bias afterwards", "it is no vector of the layer's rows", write_bias)
    if node.target is aten.einsum.default and product_of(node, constant) is not None:
        rewrite = functools.partial(_write_product, constant)
        return _accept(node, "write einsum as a product", "one form for one operator", rewrite)
    if node.target is aten.pad.default and arg(node, "mode") == "constant":
        return _accept(node, "write pad as constant_pad_nd", "one form for one operator", write_padding)
    if node.target is aten.glu.default and isinstance(node.meta["val"].shape[arg(node, "dim")], int):
        return _accept(node, "write glu as a product", "its halves are channels of their own", write_glu)
    if is_extreme(node):
        return _accept(node, f"write {operator_name(node)} with one result", "nobody reads positions", write_extreme)
    if node.target is aten.type_as.default:
        return _accept(node, "write type_as as a conversion", "it reads no values of its other input", write_conversion)
    if splits_heads(node):
        return _accept(node, "permute batch and heads", "it does not merge them", write_heads)
    if node.target in _VIEW:
        return _accept(node, "write view as reshape", "it holds for any strides", _write_reshape)
    if node.target is _BATCH_NORM and all(_is_item(user) for user in node.users):
        return _accept(node, "write as batch_norm", "one result instead of three", _write_batch_norm)
    if node.target is aten.cat.default and len(_something(node)) < len(arg(node, "tensors")):
        return _accept(node, "drop what holds nothing", "cat passes over empty tensors", _drop_nothing)
    if node.target in _SPLIT and not _splits_symbolic(node) and all(_is_item(user) for user in node.users):
        return _accept(node, f"write {operator_name(node)} as slices", "one result instead of several", _write_slices)
    return None


def _accept(node: fx.Node, what: str, why: str, rewrite: Callable[[fx.GraphModule, fx.Node], None]) -> Decision:
    return Decision("canonicalize", owner(node), what, why, data={"node": node, "rewrite": rewrite})


def _in_training(node: fx.Node) -> bool:
    return "dropout" in operator_name(node) and bool(arg(node, "train"))


def _lays_out(node: fx.Node) -> bool:
    """Whether it gives one of our own operators the memory layout it reads."""
    return any(map(is_ours, node.users))


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _something(cat: fx.Node) -> list[fx.Node]:
    """What is left of its tensors without those that add nothing; one at least, and one of its dtype.

    That is slices of size 0 and tensors of shape [0], which `cat` allows beside those of any rank: an empty cache.
    """
    tensors, dim, dtype = arg(cat, "tensors"), arg(cat, "dim"), cat.meta["val"].dtype
    left = [n for n in tensors if (val := n.meta["val"]).shape[dim if val.dim() == rank_of(cat) else 0] != 0]
    left = left or [max(tensors, key=rank_of)]
    return left if any(n.meta["val"].dtype == dtype for n in left) else tensors


def _splits_symbolic(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    return arg(node, "dim") % rank_of(source) in symbolic_dims(source)


def _drop(gm: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(cast(fx.Node, node.args[0]))
    gm.graph.erase_node(node)


def _write_reshape(gm: fx.GraphModule, node: fx.Node) -> None:
    node.target = aten.reshape.default


def _takes_all(node: fx.Node) -> bool:
    start, end, step = (arg(node, name) for name in ("start", "end", "step"))
    return start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= sys.maxsize))


def _write_linear(gm: fx.GraphModule, node: fx.Node) -> None:
    _compute(gm, write_linear(gm, node))


def _write_product(constant: Collection[fx.Node], gm: fx.GraphModule, node: fx.Node) -> None:
    product = cast(Product, product_of(node, constant))  # again: its tensors may have been rewritten meanwhile
    stored = write_product(gm, node, product)
    if stored is not None:
        _compute(gm, stored)


def _drop_nothing(gm: fx.GraphModule, node: fx.Node) -> None:
    node.args = (_something(node), *node.args[1:])


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


def _constant_nodes(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """Weights, and what is computed from weights alone; in order."""
    constant: dict[fx.Node, None] = dict.fromkeys(gm.graph.find_nodes(op="get_attr"))
    for node in gm.graph.nodes:
        if node.op == "call_function" and _is_constant(node, constant):
            constant[node] = None
    return constant


def _constants(constant: Collection[fx.Node]) -> Iterator[Decision]:
    """The last nodes of every sub-graph that reads weights only."""
    for node in constant:
        last = any(user not in constant for user in node.users) and isinstance(node.meta["val"], Tensor)
        if node.op == "call_function" and last and node.target not in _IDENTITY:
            yield _accept(node, "compute it now", "it depends on no input", _compute)


def _is_constant(node: fx.Node, constant: Collection[fx.Node]) -> bool:
    value = node.meta.get("val")
    parts: Sequence[Any] = value if isinstance(value, (tuple, list)) and value else [value]
    if not all(isinstance(v, Tensor) and all(isinstance(size, int) for size in v.shape) for v in parts):
        return False
    pure = all(n in constant for n in node.all_input_nodes) and not _is_random(node)
    return pure and sum(v.numel() * v.element_size() for v in parts) <= _LARGEST_CONSTANT_BYTES


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _compute(gm: fx.GraphModule, node: fx.Node) -> None:
    made_of = _made_of(gm, node)
    value = _evaluate(gm, made_of).clone(memory_format=torch.contiguous_format)  # no view: files hold each tensor once
    name, inside = _constant_name(gm, made_of), {*made_of}
    readers = {n for n in gm.graph.find_nodes(op="get_attr") if n.target == name}
    replaces = readers <= inside and all(user in inside for n in made_of[:-1] for user in n.users)
    name = name if replaces else free_name(gm, name)
    set_tensor(gm, name, value)
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(name)
    constant.meta.update({key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta})
    node.replace_all_uses_with(constant)
    for n in reversed(made_of):
        if not n.users:
            gm.graph.erase_node(n)
    _unshare(gm, constant)


def _constant_name(gm: fx.GraphModule, made_of: Sequence[fx.Node]) -> str:
    """The name of the largest tensor it is made of; `conv.weight` for what prune makes of `conv.weight_orig`."""
    sources = [str(n.target) for n in made_of if n.op == "get_attr"]
    if not sources:
        return f"{owner(made_of[-1])}.{operator_name(made_of[-1])}"
    largest = max(sources, key=lambda name: (get_tensor(gm, name).numel(), name.endswith("_orig")))
    return largest.removesuffix("_orig")


def _made_of(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The node and all that it is computed from, in order."""
    found, left = {node}, [node]
    while left:
        new = [n for n in left.pop().all_input_nodes if n not in found]
        found.update(new)
        left += new
    return [n for n in gm.graph.nodes if n in found]


def _evaluate(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> Tensor:
    done: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                done[node] = get_tensor(gm, str(node.target))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: done[n])
                done[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
    return cast(Tensor, done[nodes[-1]])


def _shared(gm: fx.GraphModule) -> Iterator[Decision]:
    for node in gm.graph.nodes:
        if node.op == "get_attr" and len(node.users) > 1:
            what = f"read {node.target} at {len(node.users)} places by a node of its own"
            yield _accept(node, what, "each use can then be cut by itself", _unshare)


def _squeezes(gm: fx.GraphModule) -> Iterator[Decision]:
    """Those that take the batch of a single sample. A model that runs so is to give what it gives."""
    found = [n for n in gm.graph.nodes if squeezes_batch(n)]
    if found and not takes_one_sample(gm):
        for node in found:
            yield _accept(node, "name what squeeze takes", "nothing takes one sample without its batch", write_squeeze)


def _unshare(gm: fx.GraphModule, node: fx.Node) -> None:
    for user in list(node.users)[1:]:
        with gm.graph.inserting_before(user):
            copy = gm.graph.get_attr(str(node.target))
        copy.meta.update(node.meta)
        user.replace_input_with(node, copy)


__all__ = ["apply", "plan"]
