"""Layers that cost more than `choose_formats` took for granted, timed as they are: another format may win, or none.

On a CPU it times layers as if `permute_channels` could put all rows in order. It cannot where layers whose outputs are
added have groups of their own, as masks have that were made layer by layer, nor where heads of attention are told
apart.

On a GPU it times linear layers in shuffled blocks with features first. What makes their x and reads their y has
features last, unless it is such a layer too: a layer pays for its turns, and one that becomes dense lets others turn.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx

from fxsparse.formats import FORMATS
from fxsparse.formats.format import Packed
from fxsparse.formats.gpu import Turns, turns
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import aten, get_tensor
from fxsparse.passes.choose_formats import FORMAT, GROUPS, fitting, is_summed, margin
from fxsparse.passes.context import Context, FormatTimer, LayerTimer, TurnTimer
from fxsparse.passes.permute_channels import in_order

Timers = tuple[FormatTimer, LayerTimer]


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """Where layers are timed, one decision per packed layer that scatters its rows, or whose x or y is turned."""
    if ctx.time_format is None or ctx.time_layer is None or ctx.force_formats:
        return []
    packed = [n for n in gm.graph.nodes if n.op == "call_function" and n.meta.get(FORMAT)]
    scattered = [n for n in packed if n.meta["val"].device.type == "cpu" and not in_order(n)]
    timers = ctx.time_format, ctx.time_layer
    again = [_scattered(gm, node, ctx, timers) for node in scattered]
    on_gpu = [n for n in packed if n.meta["val"].is_cuda and n.meta[FORMAT] == "shuffled_block"]
    return again + _turned(gm, [n for n in on_gpu if n.target is aten.linear.default], ctx, timers)


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Note the other format, or that there is none."""
    node, packed = cast(fx.Node, decision.data["node"]), cast("Packed | None", decision.data["packed"])
    node.meta[FORMAT] = decision.data["format"] if packed else ""
    node.meta[GROUPS] = packed.row_groups if packed else []


def _ways(gm: fx.GraphModule, node: fx.Node, ctx: Context) -> tuple[Tensor, dict[str, Packed]]:
    """The weight, and what it is in its format and in those that scattered rows cost nothing."""
    weight, now = get_tensor(gm, str(cast(fx.Node, node.args[1]).target)), node.meta[FORMAT]
    others = [f for f in fitting(node, ctx) if f.writes_anywhere and not f.why_not(node, weight)]
    anywhere = {f.name: f.pack(weight) for f in others}
    return weight, {now: FORMATS[now].pack(weight, node.meta[GROUPS]), **anywhere}


def _scattered(gm: fx.GraphModule, node: fx.Node, ctx: Context, timers: Timers) -> Decision:
    time_format, time_layer = timers
    weight, ways = _ways(gm, node, ctx)
    summed = is_summed(node)
    seconds = {way: time_format(node, packed, summed=summed, scattered=True) for way, packed in ways.items()}
    seconds["dense"] = time_layer(node, *weight.shape[:2])
    return _decide(node, "its rows stay scattered", ways, seconds, ctx)


def _turned(gm: fx.GraphModule, layers: list[fx.Node], ctx: Context, timers: Timers) -> list[Decision]:
    """One decision for each of these that turns x or y, if all that are left stay packed."""
    if ctx.time_turn is None:
        return []
    alone = {node: _alone(gm, node, timers) for node in layers}
    decisions: dict[fx.Node, Decision] = {}
    lost: set[fx.Node] = set(layers)
    while lost:
        found = {
            node: _if_turned(node, *alone[node], _turning_s(node, needed, ctx.time_turn), ctx)
            for node, needed in turns(gm, layers).items()
            if any(needed)
        }
        decisions |= found
        lost = {node for node, decision in found.items() if decision.accepted}
        layers = [node for node in layers if node not in lost]
    return list(decisions.values())


def _alone(gm: fx.GraphModule, node: fx.Node, timers: Timers) -> tuple[Packed, float, float]:
    """The packed weight, and seconds with it and with the dense one."""
    weight = get_tensor(gm, str(cast(fx.Node, node.args[1]).target))
    packed = FORMATS[node.meta[FORMAT]].pack(weight, node.meta[GROUPS])
    time_format, time_layer = timers
    return packed, time_format(node, packed), time_layer(node, *weight.shape[:2])


def _turning_s(node: fx.Node, needed: Turns, time_turn: TurnTimer) -> float:
    x = needed.x * time_turn(cast(fx.Node, node.args[0]), True) if needed.x else 0.0
    return x + (time_turn(node, False) if needed.y else 0.0)


def _if_turned(
    node: fx.Node, packed: Packed, packed_s: float, dense_s: float, turning_s: float, ctx: Context
) -> Decision:
    now = node.meta[FORMAT]
    seconds = {now: packed_s + turning_s, "dense": dense_s}
    return _decide(node, f"{turning_s * 1e6:.0f} us are for turning", {now: packed}, seconds, ctx)


def _decide(node: fx.Node, reason: str, ways: dict[str, Packed], seconds: dict[str, float], ctx: Context) -> Decision:
    now, factor = node.meta[FORMAT], margin(node, ctx)
    best = min(seconds, key=lambda way: seconds[way] * (factor if way == "dense" else 1))
    what = {"dense": "keep it dense", now: f"store it otherwise than as {now}"}.get(best, f"store as {best}")
    times = ", ".join(f"{way} {s * 1e6:.0f} us" for way, s in seconds.items())
    data: dict[str, Any] = {"node": node, "format": best, "packed": ways.get(best), "sparse_us": seconds[best] * 1e6}
    name = str(cast(fx.Node, node.args[1]).target)
    return Decision("choose_again", name, what, f"{reason}: {times}", best != now, data)
