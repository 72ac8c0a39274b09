"""Batch norm into the convolution or linear layer before it.

    y = gamma (W x + b - mean) / sqrt(var + eps) + beta = (s W) x + (s (b - mean) + beta),  s = gamma / sqrt(var + eps)

Computed in float64 and rounded once. Refused when something else reads the convolution, or a weight is computed.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import (
    arg,
    aten,
    call_nodes,
    new_weight,
    operator_name,
    owner,
    replace_weight,
    set_arg,
    weight_of,
)
from fxsparse.passes.context import Context

FOLDABLE = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per batch norm."""
    return [_decide(node) for node in call_nodes(gm, aten.batch_norm.default)]


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Scale the weight, move the shift into the bias, drop the batch norm."""
    norm = cast(fx.Node, decision.data["node"])
    producer = cast(fx.Node, norm.args[0])
    weight_node = cast(fx.Node, producer.args[1])
    weight = weight_of(gm, weight_node)
    assert weight is not None  # plan asked for it
    scale, shift = _affine(gm, norm, weight_of(gm, arg(producer, "bias")))
    wide = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    replace_weight(gm, weight_node, wide.to(weight.dtype))
    bias = new_weight(gm, producer, f"{owner(producer)}.bias", shift.to(weight.dtype))
    bias.meta["val"] = norm.meta["val"]  # replaced by the next propagation of shapes
    set_arg(producer, "bias", bias)
    norm.replace_all_uses_with(producer)
    gm.graph.erase_node(norm)


def _decide(norm: fx.Node) -> Decision:
    why = _why_not(norm)
    if why:
        return Decision("fold_batch_norm", owner(norm), "fold batch norm", why, accepted=False)
    producer = cast(fx.Node, norm.args[0])
    return Decision(
        "fold_batch_norm", owner(norm), f"fold batch norm into {owner(producer)}", "only it reads the convolution",
        data={"node": norm},
    )  # fmt: skip


def _why_not(norm: fx.Node) -> str:
    producer = cast(fx.Node, norm.args[0])
    if producer.target not in FOLDABLE:
        return f"its input is {operator_name(producer)}, not a convolution"
    others = [n for n in producer.users if n is not norm]
    if others:
        return f"{operator_name(producer)} is also read by {operator_name(others[0])}"
    weights = [producer.args[1], arg(producer, "bias"), *norm.args[1:5]]
    if any(isinstance(w, fx.Node) and w.op != "get_attr" for w in weights):
        return "a weight, bias or statistic is computed at run time"
    # features lie in the last dimension, or there is no batch
    if norm.meta["val"].dim() != cast(fx.Node, producer.args[1]).meta["val"].dim():
        return f"its channels are not the rows of {operator_name(producer)}"
    return ""


def _affine(gm: fx.GraphModule, norm: fx.Node, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 scale and shift [O] of norm(x + bias)."""
    mean, var = (cast(Tensor, weight_of(gm, arg(norm, name))).double() for name in ("running_mean", "running_var"))
    gamma, beta = (weight_of(gm, arg(norm, name)) for name in ("weight", "bias"))
    scale = torch.rsqrt(var + arg(norm, "eps"))
    scale = scale * gamma.double() if gamma is not None else scale
    shift = ((bias.double() if bias is not None else 0.0) - mean) * scale
    return scale, shift + beta.double() if beta is not None else shift
