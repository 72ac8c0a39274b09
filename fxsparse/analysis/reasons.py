"""Why a dead row or column of a weight is still there: what needs it, followed to the first reader that does."""

from __future__ import annotations

from collections import Counter
from typing import cast

from torch import Tensor, fx

from fxsparse.ir.bits import any_along
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, operator_name, owner
from fxsparse.ir.layout import NEEDED, Layout
from fxsparse.rules import Rule, rule_of
from fxsparse.rules.contraction import Convolution, Linear
from fxsparse.rules.elementwise import Elementwise
from fxsparse.rules.movement import Movement

_NEEDED = "needed"
BLOCKERS = ("has no rule", "cannot be cut", "several results")


def is_layer(node: fx.Node) -> bool:
    """A convolution or linear whose weight and bias are stored."""
    if not isinstance(rule_of(node), (Convolution, Linear)):
        return False
    weight, bias = cast(fx.Node, node.args[1]), arg(node, "bias")
    stored = weight.op == "get_attr" and (bias is None or bias.op == "get_attr")
    return stored and len(weight.meta["val"].shape) > 1


def rows_kept(layer: fx.Node, facts: Facts, layout: Layout) -> Counter[str]:
    """Rows that do not depend on the input, or that nobody asked for, and are kept: how many for which reason."""
    weight = cast(fx.Node, layer.args[1])
    reasons = Counter(layout.why(weight, 0))
    dim = len(layout.kept[layer]) - 1 if isinstance(rule_of(layer), Linear) else _channel_dim(layer, layout)
    known = ~any_along(facts.unknown[layer].movedim(dim, 0).unsqueeze(-1).flatten(1), 1).cpu()
    stays = layout.kept[layer][dim] & known & (layout.cause[layer][dim] == NEEDED)
    reasons.update(_reader(layer, dim, int(i), facts) for i in stays.nonzero().flatten())
    return reasons


def columns_kept(layer: fx.Node, facts: Facts, layout: Layout) -> Counter[str]:
    """Columns that hold only zeros and are kept: how many for which reason."""
    weight = cast(fx.Node, layer.args[1])
    used = any_along((facts.value[weight] != 0).movedim(1, 0).flatten(1), 1).cpu()
    reasons = Counter(layout.why(weight, 1, ~used))
    idle = int((layout.kept[weight][1] & ~used & (layout.cause[weight][1] == NEEDED)).sum())
    if idle:
        reasons["other readers of its input need them"] += idle
    return reasons


def _channel_dim(layer: fx.Node, layout: Layout) -> int:
    return len(layout.kept[layer]) - len(layout.kept[cast(fx.Node, layer.args[1])]) + 1


def _reader(node: fx.Node, dim: int, channel: int, facts: Facts) -> str:
    """Follow one known channel to the first reader that does something else with it."""
    for user in node.users:
        rule = rule_of(user)
        if user.op == "output" or type(rule) is Rule:
            return _read_by(user)
        if user not in facts.unknown:  # put in since
            continue
        if not _asks(user, rule, dim, channel, node, facts):
            continue
        if isinstance(rule, Convolution):
            return f"carrier or border of {owner(user)}"
        if not _aligned(user, node, dim, facts):
            return _read_by(_behind(user, facts))
        if facts.unknown[user].select(dim, channel).any():
            others = [owner(n) for n in user.all_input_nodes if n is not node and n.op != "get_attr"]
            return f"coupled{f' with {others[0]}' if others else ''} by {operator_name(user)}"
        if (found := _reader(user, dim, channel, facts)) != _NEEDED:
            return found
    return _NEEDED


def _behind(node: fx.Node, facts: Facts) -> fx.Node:
    """Data movement holds nothing by itself: the first reader behind it that needs something."""
    while isinstance(rule_of(node), Movement):
        asking = [u for u in node.users if u.op == "output" or (u in facts.demanded and facts.demanded[u].any())]
        if not asking:
            break
        node = asking[0]
    return node


def _read_by(node: fx.Node) -> str:
    if node.op == "output":
        return "output signature"
    if type(rule_of(node)) is Rule:
        return f"{operator_name(node)} ({owner(node)}) has no rule: everything it reads stays"
    return f"read by {operator_name(node)} ({owner(node)})"


def _aligned(user: fx.Node, node: fx.Node, dim: int, facts: Facts) -> bool:
    """Whether the channel has the same number in the reader."""
    ours, theirs = facts.unknown[node].shape, facts.unknown[user].shape
    return len(ours) == len(theirs) and ours[dim] == theirs[dim]


def _asks(user: fx.Node, rule: Rule, dim: int, channel: int, node: fx.Node, facts: Facts) -> bool:
    """Whether `user` needs the channel, as far as that can be told."""
    if isinstance(rule, Convolution):
        weight: Tensor = facts.value[cast(fx.Node, user.args[1])]
        return weight.shape[1] <= channel or bool((weight[:, channel] != 0).any())
    if isinstance(rule, Elementwise) and _aligned(user, node, dim, facts):
        return bool(facts.demanded[user].select(dim, channel).any())
    return bool(facts.demanded[user].any())
