"""For every weight the fastest way to store it: dense, or a format of `fxsparse.formats`.

A format is chosen when the layer, timed alone on this machine with the rows as the format wants them, is faster than
the dense layer by a margin; of several formats the fastest. Without a timer (a dry run) the number of stored elements
decides instead, and the decision says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, fx

from fxsparse.analysis.reasons import is_layer
from fxsparse.errors import FxSparseError, first_line
from fxsparse.formats import FORMATS, Format
from fxsparse.formats.format import Packed
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import arg, aten, get_tensor
from fxsparse.ir.symbols import concrete
from fxsparse.passes.context import Context
from fxsparse.passes.fuse_epilogues import is_sum

# Timed alone, on warm caches, a packed layer looks better than it is inside a network. With 0.97 here ResNet-50 at 15 %
# sparsity ended up slower than dense: that row is in tools/rows.
FASTER = 0.87
MODELLED = 0.85  # of the dense work, where nothing is timed
NO_ZEROS = "the weight has no zeros"
# Bytes of a result for which glibc asks the system at every call, however often it is freed (M_MMAP_THRESHOLD_MAX). A
# dense layer pays for those new pages; our kernels write into memory that is kept, which may pay without any zeros.
NEW_PAGES = 32 << 20
# Ours may be faster without zeros at convolutions of few input channels, which fill no vector of oneDNN's, and at
# products of one token, which it and MKL read slowly from memory. Timed alone those are not flattered: the weights of
# the first are in the caches in a network too, and those of the second gain more where they are not.
FEW_CHANNELS, FEW_BYTES, FASTER_WITHOUT_ZEROS = 16, 64 << 10, 0.97
FORMAT, GROUPS = "fxsparse_format", "fxsparse_row_groups"  # keys of node.meta; format "": decided to be dense


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per layer and format that could store it."""
    layers = [n for n in gm.graph.nodes if n.op == "call_function" and is_layer(n) and FORMAT not in n.meta]
    return [decision for node in layers for decision in _best(_of_layer(gm, node, ctx))]


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Note the format and its groups of rows on the node; `lower_formats` carries it out."""
    node = cast(fx.Node, decision.data["node"])
    node.meta[FORMAT] = decision.data["format"]
    node.meta[GROUPS] = decision.data["groups"]


def packings(node: fx.Node, weight: Tensor, ctx: Context) -> list[Packed]:
    """What this layer's weight, or a part of it, is in the formats that would do less than the dense layer's work."""
    if bool(weight.all()):
        return []
    packed = [f.pack(weight) for f in fitting(node, ctx) if not f.why_not(node, weight)]
    return [p for p in packed if p.work < weight.numel()]


def _best(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions of one layer with at most one accepted: the fastest or, where nothing was timed, the smallest."""
    accepted = [d for d in decisions if d.accepted]
    if len(accepted) < 2:
        return list(decisions)
    best = min(accepted, key=lambda d: cast(float, d.data.get("sparse_us", d.data["share"])))
    beaten = f"; {best.data['format']} is {'faster' if 'sparse_us' in best.data else 'smaller'}"
    return [d if d is best or not d.accepted else _refused(d, f"{d.data['format']}: {d.why}{beaten}")
            for d in decisions]  # fmt: skip


def _refused(decision: Decision, why: str) -> Decision:
    return dataclasses.replace(decision, why=why, accepted=False)


def _of_layer(gm: fx.GraphModule, node: fx.Node, ctx: Context) -> list[Decision]:
    """One decision for each format that is for such layers; one alone where none is, or where nothing is sparse."""
    name = str(cast(fx.Node, node.args[1]).target)
    full = bool(get_tensor(gm, name).all())
    no_zeros = [Decision("choose_formats", name, "store in a sparse format", NO_ZEROS, False)] if ctx.formats else []
    if full and not ctx.force_formats and not _may_pay_dense(node, ctx):
        return no_zeros
    formats = fitting(node, ctx) or [FORMATS[known] for known in ctx.formats[:1]]
    decisions = [_decide(gm, node, f, ctx) for f in formats]
    if not full or any(d.accepted for d in decisions):
        return decisions
    return [_refused(d, f"{NO_ZEROS}; {d.why}") for d in decisions if "sparse_us" in d.data] or no_zeros


def fitting(node: fx.Node, ctx: Context) -> list[Format]:
    """The target's formats that are for such layers."""
    return [FORMATS[known] for known in ctx.formats if node.target in FORMATS[known].layers]


def _may_pay_dense(node: fx.Node, ctx: Context) -> bool:
    """Whether our kernels may be faster than the dense layer's even without zeros, where that can be timed."""
    val = node.meta["val"]
    if ctx.time_format is None or val.device.type != "cpu":
        return False
    return _suits(node, ctx) or math.prod(concrete(node, ctx.batch)) * val.dtype.itemsize >= NEW_PAGES


def margin(node: fx.Node, ctx: Context) -> float:
    """Times the dense layer's seconds: what a packed one has to take less than."""
    return FASTER_WITHOUT_ZEROS if _suits(node, ctx) else FASTER


def _suits(node: fx.Node, ctx: Context) -> bool:
    """An ungrouped convolution of few input channels, as first ones are, or a product of one token, on a CPU."""
    val, weight = node.meta["val"], cast(fx.Node, node.args[1]).meta["val"]
    if val.device.type != "cpu":
        return False
    if node.target is aten.linear.default:
        return bool(math.prod(concrete(node, ctx.batch)) == weight.shape[0])
    if node.target is not aten.conv2d.default or arg(node, "groups") != 1:
        return False
    return bool(weight.shape[1] < FEW_CHANNELS and weight.numel() * weight.itemsize <= FEW_BYTES)


def is_summed(layer: fx.Node) -> bool:
    """Whether its rows are read and written once more, for a sum: `fuse_epilogues` will put that into the layer."""
    return len(layer.users) == 1 and all(is_sum(user, layer) for user in layer.users)


def _decide(gm: fx.GraphModule, node: fx.Node, fmt: Format, ctx: Context) -> Decision:
    name = str(cast(fx.Node, node.args[1]).target)
    what = f"store as {fmt.name}"
    weight = get_tensor(gm, name)
    why = (fmt.why_not_standard if ctx.standard_operators else fmt.why_not)(node, weight)
    if why:
        return Decision("choose_formats", name, what, why, False)
    packed = fmt.pack(weight)
    work, groups = fmt.standard(packed) if ctx.standard_operators else (packed.work, packed.row_groups)
    share = work / weight.numel()
    if share >= 1 and not _may_pay_dense(node, ctx):
        return Decision("choose_formats", name, what, f"{fmt.name}: {share:.0%} of the dense layer's work", False)
    data = {"node": node, "format": fmt.name, "groups": groups, "packed": packed, "share": share}
    if ctx.time_format is None or ctx.time_layer is None or ctx.force_formats:
        why = "" if ctx.force_formats or ctx.standard_operators else fmt.why_not_untimed(node)
        accepted = (share < MODELLED and not why) or ctx.force_formats
        why = why or _named(fmt, f"{share:.0%} of the work, not timed", accepted)
        return Decision("choose_formats", name, what, why, accepted, data)
    dense_us = ctx.time_layer(node, *weight.shape[:2]) * 1e6
    try:
        sparse_us = ctx.time_format(node, packed) * 1e6
    except (FxSparseError, RuntimeError) as error:  # a GPU's kernels are Triton's and cuSPARSELt's: some cannot run
        return Decision(
            "choose_formats", name, what, _named(fmt, f"it cannot run here: {first_line(error)}", False), False
        )
    faster = sparse_us < margin(node, ctx) * dense_us
    why = _named(fmt, f"{share:.0%} of the work: {sparse_us:.0f} us, dense {dense_us:.0f} us", faster)
    data |= {"dense_us": dense_us, "sparse_us": sparse_us}
    return Decision("choose_formats", name, what, why, faster, data)


def _named(fmt: Format, why: str, accepted: bool) -> str:
    """Refusals of several formats are told apart by their reasons alone, in a report."""
    return why if accepted else f"{fmt.name}: {why}"
