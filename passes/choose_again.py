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
from fxsparse.passes.choose_formats import FASTER, FORMAT, GROUPS
from fxsparse.passes.context import Context
from fxsparse.passes.permute_channels import in_order


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per packed layer on a CPU that scatters its rows, where layers are timed."""
    if ctx.time_format is None or ctx.time_layer is None or ctx.force_formats:
        return []
    packed = [n for n in gm.graph.nodes if n.op == "call_function" and n.meta.get(FORMAT)]
    return [_decide(gm, n, ctx) for n in packed if n.meta["val"].device.type == "cpu" and not in_order(n)]


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Note the other format, or that there is none."""
    node, packed = cast(fx.Node, decision.data["node"]), cast("Packed | None", decision.data["packed"])
    node.meta[FORMAT] = decision.data["format"] if packed else ""
    node.meta[GROUPS] = packed.row_groups if packed else []


def _decide(gm: fx.GraphModule, node: fx.Node, ctx: Context) -> Decision:
    assert ctx.time_layer is not None
    assert ctx.time_format is not None
    name, now = str(cast(fx.Node, node.args[1]).target), node.meta[FORMAT]
    weight = get_tensor(gm, name)
    ways: dict[str, Packed | None] = {now: FORMATS[now].pack(weight, node.meta[GROUPS])}
    ways |= {other: FORMATS[other].pack(weight) for other in _anywhere(node, weight, ctx)}
    seconds = {way: ctx.time_format(node, packed, scattered=True) for way, packed in ways.items() if packed is not None}
    ways["dense"], seconds["dense"] = None, ctx.time_layer(node, *weight.shape[:2])
    best = min(seconds, key=lambda way: seconds[way] * (FASTER if way == "dense" else 1))
    times = ", ".join(f"{way} {s * 1e6:.0f} us" for way, s in seconds.items())
    data: dict[str, Any] = {"node": node, "format": best, "packed": ways[best]}
    what = {"dense": "keep it dense", now: f"store it otherwise than as {now}"}.get(best, f"store as {best}")
    return Decision("choose_again", name, what, f"its rows stay scattered: {times}", best != now, data)


def _anywhere(node: fx.Node, weight: Tensor, ctx: Context) -> list[str]:
    """The target's formats that need no order of rows."""
    fitting = [FORMATS[name] for name in ctx.formats if node.target in FORMATS[name].layers]
    return [f.name for f in fitting if f.writes_anywhere and not f.why_not(node, weight)]
