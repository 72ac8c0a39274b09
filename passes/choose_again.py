"""Layers whose rows stay scattered, timed as they are: a format that writes anywhere, or none, may be faster.

`choose_formats` times layers as if `permute_channels` could put all rows in order. It cannot where layers whose outputs
are added have groups of their own, as masks have that were made layer by layer, nor where heads of attention are told
apart.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx

from fxsparse.formats import FORMATS
from fxsparse.formats.format import Packed
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import get_tensor
from fxsparse.passes.choose_formats import FORMAT, GROUPS, fitting, is_summed, margin
from fxsparse.passes.context import Context, FormatTimer, LayerTimer
from fxsparse.passes.permute_channels import in_order


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per packed layer on a CPU that scatters its rows, where layers are timed."""
    if ctx.time_format is None or ctx.time_layer is None or ctx.force_formats:
        return []
    packed = [n for n in gm.graph.nodes if n.op == "call_function" and n.meta.get(FORMAT)]
    scattered = [n for n in packed if n.meta["val"].device.type == "cpu" and not in_order(n)]
    return [
        _decide(node, *_ways(gm, node, ctx), margin(node, ctx), ctx.time_format, ctx.time_layer) for node in scattered
    ]


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


def _decide(
    node: fx.Node,
    weight: Tensor,
    ways: dict[str, Packed],
    margin: float,
    time_format: FormatTimer,
    time_layer: LayerTimer,
) -> Decision:
    now, summed = node.meta[FORMAT], is_summed(node)
    seconds = {way: time_format(node, packed, summed=summed, scattered=True) for way, packed in ways.items()}
    seconds["dense"] = time_layer(node, *weight.shape[:2])
    best = min(seconds, key=lambda way: seconds[way] * (margin if way == "dense" else 1))
    what = {"dense": "keep it dense", now: f"store it otherwise than as {now}"}.get(best, f"store as {best}")
    times = ", ".join(f"{way} {s * 1e6:.0f} us" for way, s in seconds.items())
    data: dict[str, Any] = {"node": node, "format": best, "packed": ways.get(best), "sparse_us": seconds[best] * 1e6}
    name = str(cast(fx.Node, node.args[1]).target)
    return Decision("choose_again", name, what, f"its rows stay scattered: {times}", best != now, data)
