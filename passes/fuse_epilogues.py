"""What follows a packed layer is done while its results are still in registers.

    act(shuffled_block(x, w, b) + r) -> shuffled_block(x, w, b, residual=r, activation=act)

Only where nothing else reads the value in between. The sum of two packed layers is fused into the later one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from fxsparse.formats.shuffled_block_aten import ACTIVATIONS, TO_FIRST
from fxsparse.formats.shuffled_block_op import channels_last, shuffled_block
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import arg, aten, operator_name, owner, set_arg
from fxsparse.passes.context import Context

_ACTIVATION = {operator: name for name, operator in ACTIVATIONS.items()}


@dataclass
class _Chain:
    """A packed layer and what is done to its result: `nodes` in order, the last one gives the fused value."""

    layer: fx.Node
    nodes: list[fx.Node]
    sum: fx.Node | None = None
    activation: str = "none"


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per packed layer with something to fuse."""
    taken: set[fx.Node] = set()
    found = []
    for layer in reversed([n for n in gm.graph.nodes if n.target is shuffled_block]):
        chain = _chain(layer, taken)
        if chain.sum is not None or chain.activation != "none":
            taken.update(chain.nodes)
            what = "fuse " + " and ".join(operator_name(n) for n in chain.nodes if n.target is not aten.permute.default)
            found.append(
                Decision("fuse_epilogues", owner(layer), what, "only it reads the result", data={"chain": chain})
            )
    return found[::-1]


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Move the layer to where its last fused operator stood, and let it do their work."""
    chain = cast(_Chain, decision.data["chain"])
    layer, last = chain.layer, chain.nodes[-1]
    is_conv = chain.nodes[0].target is aten.permute.default
    with gm.graph.inserting_before(last):
        residual = channels_last(gm, _residual(chain), is_conv) if chain.sum is not None else None
        new = gm.graph.node_copy(layer)
        result = gm.graph.call_function(aten.permute.default, (new, TO_FIRST)) if is_conv else new
    set_arg(new, "residual", residual)
    set_arg(new, "activation", chain.activation)
    last.replace_all_uses_with(result)
    for node in [*reversed(chain.nodes), layer]:
        gm.graph.erase_node(node)


def _chain(layer: fx.Node, taken: set[fx.Node]) -> _Chain:
    """Follow the only readers: the permute back, a sum, an activation. What is fused already may not be fused again."""
    chain = _Chain(layer, [])
    if arg(layer, "activation") != "none":
        return chain
    node, user = layer, _only_user(layer, taken)
    if user is not None and _is_permute_back(user):
        chain.nodes.append(user)
        node, user = user, _only_user(user, taken)
    if user is not None and arg(layer, "residual") is None and is_sum(user, node):
        chain.nodes.append(user)
        chain.sum, user = user, _only_user(user, taken)
    if user is not None and (activation := _activation(user)):
        chain.nodes.append(user)
        chain.activation = activation
    return chain


def _only_user(node: fx.Node, taken: set[fx.Node]) -> fx.Node | None:
    """The one reader of `node`, unless another layer has it already."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user not in taken else None


def _is_permute_back(node: fx.Node) -> bool:
    return node.target is aten.permute.default and list(cast("list[int]", node.args[1])) == TO_FIRST


def is_sum(node: fx.Node, ours: fx.Node) -> bool:
    """Whether it is `ours + r` with an r of the same shape and dtype."""
    if node.target is not aten.add.Tensor or arg(node, "alpha") != 1:
        return False
    other = node.args[1] if node.args[0] is ours else node.args[0]
    if not isinstance(other, fx.Node) or other is ours:
        return False
    a, b = other.meta["val"], ours.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype == node.meta["val"].dtype)


def _residual(chain: _Chain) -> fx.Node:
    """The other term of the sum, as it is now: fusing the layers before may have replaced it."""
    assert chain.sum is not None
    return next(n for n in chain.sum.all_input_nodes if n not in chain.nodes and n is not chain.layer)


def _activation(node: fx.Node) -> str:
    if node.target is aten.hardtanh.default:
        return "relu6" if (arg(node, "min_val"), arg(node, "max_val")) == (0, 6) else ""
    if node.target is aten.gelu.default and arg(node, "approximate") != "none":
        return ""
    return _ACTIVATION.get(cast(Any, node.target), "")
