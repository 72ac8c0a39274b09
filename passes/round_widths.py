"""Which dimensions keep a few dead channels, as their layers are measured to be faster so. Part of `shrink_channels`.

Dense layers fill their last register then. Packed layers gain where pixels have as many channels as fill whole cache
lines: every pixel of 251 floats begins elsewhere in a line, and each of its vectors is in two of them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from fxsparse.analysis.closure import close
from fxsparse.analysis.reasons import is_layer
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import get_tensor
from fxsparse.ir.layout import Layout
from fxsparse.passes.choose_formats import FASTER as FASTER_PACKED
from fxsparse.passes.choose_formats import is_summed, packings
from fxsparse.passes.context import Context

ROUND_TO = 16  # floats in an AVX-512 register and in a cache line; channels in a block of oneDNN's convolutions
FASTER = 0.97  # rounded layers must be at least this much faster: less is noise


def round_widths(gm: fx.GraphModule, facts: Facts, layout: Layout, ctx: Context) -> Layout:
    """`layout` with, space by space, as many dead channels as fill the last register, if layers that grow run faster.

    What must grow along grows first, such as the rest of a group: what is timed is what is built.
    """
    written = {(n.args[1], dim) for n in gm.graph.nodes if is_layer(n) for dim in (0, 1)}
    for space in layout.spaces():
        node, dim = space[0]
        kept, size = int(layout.kept[node][dim].sum()), len(layout.kept[node][dim])
        rounded = min(-(-kept // ROUND_TO) * ROUND_TO, size)
        if kept in (0, rounded) or written.isdisjoint(space):
            continue
        extra = torch.zeros(size, dtype=torch.bool, device="cpu")
        extra[(~layout.kept[node][dim]).nonzero().flatten()[: rounded - kept]] = True
        wider = layout.clone()
        wider.grow(node, dim, extra, f"rounded up to {rounded}: measured faster")
        close(gm, facts, wider, grown=[node])
        if _faster(gm, wider, layout, ctx):
            layout = wider
    return layout


def _faster(gm: fx.GraphModule, wider: Layout, layout: Layout, ctx: Context) -> bool:
    exact_s = rounded_s = 0.0
    for layer in filter(is_layer, gm.graph.nodes):
        weight = cast(fx.Node, layer.args[1])
        rounded, exact = ([each.indices(weight, dim) for dim in (0, 1)] for each in (wider, layout))
        if [*map(len, rounded)] != [*map(len, exact)]:
            exact_s += _seconds(gm, layer, exact, ctx)
            rounded_s += _seconds(gm, layer, rounded, ctx)
    return rounded_s < FASTER * exact_s


def _seconds(gm: fx.GraphModule, layer: fx.Node, kept: list[Tensor], ctx: Context) -> float:
    """Of one layer cut to these rows and columns, dense or packed as `choose_formats` will find it.

    On a GPU dense, unless formats are forced: models of these widths compete with formats and without, and odd ones
    cost a dense layer up to eight times as much, a packed one nothing.
    """
    assert ctx.time_layer is not None
    dense_s = ctx.time_layer(layer, len(kept[0]), len(kept[1]))
    weight = get_tensor(gm, str(cast(fx.Node, layer.args[1]).target))
    if ctx.time_format is None or (weight.is_cuda and not ctx.force_formats):
        return dense_s
    for dim, indices in enumerate(kept):
        weight = weight.index_select(dim, indices.to(weight.device))
    packed = [p for p in packings(layer, weight, ctx) if ctx.time_format(layer, p) < FASTER_PACKED * dense_s]
    return min([ctx.time_format(layer, p, is_summed(layer)) for p in packed], default=dense_s)
