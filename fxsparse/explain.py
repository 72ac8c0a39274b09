"""One report row per weight: what went, what stayed although it is dead, and what stopped it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxsparse.analysis.reasons import BLOCKERS, columns_kept, is_layer, rows_kept
from fxsparse.ir.decision import Decision, Plan
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, call_nodes, get_tensor, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.ir.masks import Masks
from fxsparse.ir.symbols import concrete
from fxsparse.passes import Context
from fxsparse.passes.choose_formats import NO_ZEROS
from fxsparse.report import Row


@dataclass
class Layer:
    """A convolution or linear node as captured, before any pass."""

    node: fx.Node
    name: str
    op: str
    shape: tuple[int, ...]
    macs: int
    density: float
    dense_us: float | None = None
    sparse_us: float | None = None


def layers_of(gm: fx.GraphModule) -> list[Layer]:
    """Every convolution and linear of `gm` whose weight is stored."""
    found = []
    for node in filter(is_layer, gm.graph.nodes):
        name = str(cast(fx.Node, node.args[1]).target)
        weight = get_tensor(gm, name)
        density = float((weight != 0).double().mean())
        found.append(Layer(node, name, operator_name(node), tuple(weight.shape), macs(node, weight.shape), density))
    return found


def macs(node: fx.Node, weight: Sequence[int]) -> int:
    """Multiply-accumulates for one sample: positions of the output x rows x (columns x taps) of one row."""
    shape = concrete(node)
    if operator_name(node) == "linear":
        return math.prod(shape[:-1]) * math.prod(weight)
    return math.prod(shape[len(shape) - len(weight) + 2 :]) * math.prod(weight)


def rows_of(gm: fx.GraphModule, layers: Iterable[Layer], ctx: Context, plan: Plan) -> list[Row]:
    """One row per captured layer, once `shrink_channels` ran."""
    assert ctx.facts is not None
    assert ctx.layout is not None
    alive = set(gm.graph.nodes)
    return [_row(gm, x, ctx.facts, ctx.layout, plan) if x.node in alive else _gone(x) for x in layers]


def with_formats(rows: Iterable[Row], layers: Iterable[Layer], plan: Plan) -> list[Row]:
    """The rows with what the choices of formats decided: stored and multiplied are then whole blocks only."""
    choices = [d for d in plan if d.step == "choose_again" or (d.step == "choose_formats" and d.accepted)]
    decided = {d.data["node"]: d for d in choices}  # the later one knows more, also where it leaves the format
    chosen = {node: d.data for node, d in decided.items() if d.data["format"] != "dense"}
    refused = {d.where: d.why for d in decided.values() if d.data["format"] == "dense"}
    formats = (d for d in plan.refused if d.step == "choose_formats" and not d.why.startswith(NO_ZEROS))
    for d in sorted(formats, key=_best_first):
        refused.setdefault(d.where, d.why)
    return [
        _stored(row, chosen[layer.node]) if layer.node in chosen
        else dataclasses.replace(row, dense_for=refused.get(_stored_name(layer), ""))
        for row, layer in zip(rows, layers, strict=True)
    ]  # fmt: skip


def _best_first(decision: Decision) -> float:
    """Formats that were timed by their time, the others behind them as they came."""
    return cast(float, decision.data.get("sparse_us", math.inf))


def _stored_name(layer: Layer) -> str:
    """Of its weight, once the passes ran; that of before where nothing is left of it."""
    weight = layer.node.args[1] if len(layer.node.args) > 1 else None
    return str(weight.target) if isinstance(weight, fx.Node) else layer.name


def without_a_row(gm: fx.GraphModule, rows: Iterable[Row], masks: Masks, plan: Plan) -> Plan:
    """Masked weights that no row and no decision speaks of, since no convolution or linear reads them as they are."""
    named = {row.name for row in rows} | {d.where for d in plan.accepted}
    readers = {
        str(n.target): operator_name(next(iter(n.users))) for n in gm.graph.nodes if n.op == "get_attr" and n.users
    }
    return Plan(tuple(
        Decision("shrink_channels", name, "use its mask", f"{readers[name]} is no layer that gets faster by it", False)
        for name, mask in masks.items()
        if mask.dim() > 1 and name in readers and name not in named and not bool(mask.all())
    ))  # fmt: skip


def _stored(row: Row, data: Mapping[str, Any]) -> Row:
    nse = data["packed"].nse
    return dataclasses.replace(
        row,
        stored=data["format"],
        params_after=nse,
        macs_after=row.macs_after // max(row.params_after, 1) * nse,
        sparse_us=data.get("sparse_us"),
    )


def _gone(layer: Layer) -> Row:
    """A layer that nothing depends on any more."""
    sparse_us = 0.0 if layer.dense_us is not None else None
    return Row(
        layer.name, layer.op, layer.shape, (0, *layer.shape[1:]), layer.density, layer.shape[0], layer.shape[1], (),
        None, math.prod(layer.shape), 0, layer.macs, 0, layer.dense_us, sparse_us, (), (),
    )  # fmt: skip


def _row(gm: fx.GraphModule, layer: Layer, facts: Facts, layout: Layout, plan: Plan) -> Row:
    weight_node = cast(fx.Node, layer.node.args[1])
    new = tuple(get_tensor(gm, str(weight_node.target)).shape)
    kept_rows, kept_columns = (tuple(layout.indices(weight_node, d).tolist()) for d in (0, 1))
    kept_for = _kept_for(layer, facts, layout)
    return Row(
        name=layer.name,
        op=layer.op,
        shape=layer.shape,
        new_shape=new,
        density=layer.density,
        rows_removed=layer.shape[0] - new[0],
        columns_removed=layer.shape[1] - new[1],
        kept_for=kept_for,
        blocked_by=_blocked_by(layer, kept_for, plan),
        params_before=math.prod(layer.shape),
        params_after=math.prod(new),
        macs_before=layer.macs,
        macs_after=macs(layer.node, new),
        dense_us=layer.dense_us,
        sparse_us=layer.sparse_us,
        kept_rows=kept_rows,
        kept_columns=kept_columns,
    )


def _kept_for(layer: Layer, facts: Facts, layout: Layout) -> tuple[str, ...]:
    if layer.node not in layout.kept:
        return ()
    kinds = (("row", rows_kept(layer.node, facts, layout)), ("column", columns_kept(layer.node, facts, layout)))
    return tuple(
        f"{cause} ({n} {kind}{'s' if n != 1 else ''})" for kind, reasons in kinds for cause, n in reasons.items()
    )


def _blocked_by(layer: Layer, kept_for: tuple[str, ...], plan: Plan) -> str | None:
    """The operator without a rule that stands in the way, or else what fold_constants had to leave."""
    here = owner(layer.node)
    left = [d.why for d in plan.refused if d.step == "fold_constants" and d.where == here]
    return next((cause for cause in [*kept_for, *left] if any(b in cause for b in BLOCKERS) or cause in left), None)


def parameters_after(gm: fx.GraphModule) -> int:
    """Stored floating weights that are computed with; running statistics of a batch norm are not parameters."""
    statistics = {
        str(cast(fx.Node, arg(n, name)).target)
        for n in call_nodes(gm, torch.ops.aten.batch_norm.default)
        for name in ("running_mean", "running_var")
    }
    names = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"} - statistics
    tensors = [get_tensor(gm, name) for name in names]
    return sum(t.numel() for t in tensors if t.is_floating_point())
