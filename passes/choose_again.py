"""Layers that cost more than `choose_formats` took for granted, timed as they are: another format may win, or none.

On a CPU it times layers as if `permute_channels` could put all rows in order. It cannot where layers whose outputs are
added have groups of their own, as masks have that were made layer by layer, nor where heads of attention are told
apart.

On a GPU it times linear layers in shuffled blocks with features first, while their neighbors have features last
(`turning`).
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx

from fxsparse.formats import FORMATS
from fxsparse.formats.format import Packed
from fxsparse.formats.shuffled_block_few import has_few
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import aten, get_tensor
from fxsparse.passes import turning
from fxsparse.passes.choose_formats import FORMAT, GROUPS, fitting, is_summed, margin
from fxsparse.passes.context import Context, FormatTimer, LayerTimer
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
    linear = [n for n in packed if n.target is aten.linear.default and n.meta[FORMAT] == "shuffled_block"]
    return again + _turned(gm, [n for n in linear if n.meta["val"].is_cuda and not has_few(n)], ctx, timers)


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Note the other format, or that there is none."""
    node, packed = cast(fx.Node, decision.data["node"]), cast("Packed | None", decision.data["packed"])
    node.meta[FORMAT] = decision.data["format"] if packed else ""
    node.meta[GROUPS] = packed.row_groups if packed else []


def _ways(gm: fx.GraphModule, node: fx.Node, ctx: Context) -> tuple[Tensor, dict[str, Packed]]:
    """The weight, and what it is in its format and in those that scattered rows cost nothing."""
    weight, now = _weight(gm, node), node.meta[FORMAT]
    others = [f for f in fitting(node, ctx) if f.writes_anywhere and not f.why_not(node, weight)]
    anywhere = {f.name: f.pack(weight) for f in others}
    return weight, {now: FORMATS[now].pack(weight, node.meta[GROUPS]), **anywhere}


def _scattered(gm: fx.GraphModule, node: fx.Node, ctx: Context, timers: Timers) -> Decision:
    time_format, time_layer = timers
    weight, ways = _ways(gm, node, ctx)
    summed = is_summed(node)
    seconds = {way: time_format(node, packed, summed=summed, scattered=True) for way, packed in ways.items()}
    seconds["dense"] = time_layer(node, *weight.shape[:2])
    factor = margin(node, ctx)
    best = min(seconds, key=lambda way: seconds[way] * (factor if way == "dense" else 1))
    return _decision(node, "its rows stay scattered", ways, seconds, best)


def _turned(gm: fx.GraphModule, layers: list[fx.Node], ctx: Context, timers: Timers) -> list[Decision]:
    """One decision for each of these around which something is turned, or would be if it were dense."""
    if ctx.time_turn is None:
        return []
    time_format, time_layer = timers
    weights = {node: _weight(gm, node) for node in layers}
    packed = {node: FORMATS[node.meta[FORMAT]].pack(weight, node.meta[GROUPS]) for node, weight in weights.items()}
    alone = {
        node: turning.Alone(time_format(node, packed[node]), time_layer(node, *weight.shape), margin(node, ctx))
        for node, weight in weights.items()
    }
    weighed = turning.weigh(gm, alone, ctx)
    return [_of_turns(n, packed[n], w) for n, w in weighed.items() if max(w.turning, w.without) >= 1e-9]


def _weight(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    return get_tensor(gm, str(cast(fx.Node, node.args[1]).target))


def _of_turns(node: fx.Node, packed: Packed, found: turning.Weighed) -> Decision:
    now = node.meta[FORMAT]
    reason = f"{found.turning * 1e6:.0f} us are for turning"
    if found.without >= 1e-9:
        reason += f", {found.without * 1e6:.0f} us without it for more turning"
    return _decision(
        node, reason, {now: packed}, {now: found.packed, "dense": found.dense}, now if found.stays else "dense"
    )


def _decision(node: fx.Node, reason: str, ways: dict[str, Packed], seconds: dict[str, float], best: str) -> Decision:
    now = node.meta[FORMAT]
    what = {"dense": "keep it dense", now: f"store it otherwise than as {now}"}.get(best, f"store as {best}")
    times = ", ".join(f"{way} {s * 1e6:.0f} us" for way, s in seconds.items())
    data: dict[str, Any] = {"node": node, "format": best, "packed": ways.get(best), "sparse_us": seconds[best] * 1e6}
    name = str(cast(fx.Node, node.args[1]).target)
    return Decision("choose_again", name, what, f"{reason}: {times}", best != now, data)
