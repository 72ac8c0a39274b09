"""Channels whose value does not depend on the input are folded into the layers that read them.

y[o, p] = b[o] + sum_i sum_t w[o, i, t] x[i, p + t], and x[i] = c_i at every position:

- c_i = 0: the column w[:, i] multiplies nothing; it is set to zero.
- no zero padding (or a linear layer): b[o] += c_i sum_t w[o, i, t], and the column is set to zero. A linear layer reads
  elements one by one, so positions may differ.
- zero padding: the contribution of a constant differs at the border. It is the same *shape* for all constant channels,
  so one of them, the **carrier**, speaks for all: w[:, car] = sum_i w[:, i] c_i / c_car, the other columns are set to
  zero. Exact for any image size; no bias map, no new operator. All readers of a tensor choose the same carrier.
- an output row that is one constant v: its weights are set to zero and its bias to v.
- a value that is known in every element, read by an elementwise operator, becomes a constant; adding 0 goes away.

Refused: constants that differ over positions under a convolution, constants under a grouped convolution with padding.
Afterwards nobody asks for the channels, and shrink_channels cuts them. All sums are in float64 and rounded once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from fxsparse.analysis.constant_output import constant_output
from fxsparse.analysis.reasons import is_layer
from fxsparse.analysis.sweep import analyze
from fxsparse.ir.bits import some
from fxsparse.ir.decision import Decision
from fxsparse.ir.facts import ChannelSummary, Facts, smallest
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
from fxsparse.ir.symbols import symbolic_dims
from fxsparse.passes.context import Context
from fxsparse.rules.contraction import TransposedConvolution

_PAIRWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """Decisions for every layer that reads or makes constants."""
    facts = ctx.facts = analyze(gm)
    decisions: list[Decision] = []
    for node in filter(is_layer, gm.graph.nodes):
        decisions += _Fold(gm, node, facts).decide()
    for node in call_nodes(gm, *TransposedConvolution.ops):
        decisions += _transposed(gm, node, facts)
    for node in call_nodes(gm, *_PAIRWISE):
        decisions += _known_operands(gm, node, facts)
    return decisions + constant_output(gm, facts)


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Store the new weight and bias, or put the constant in the operand's place."""
    node = cast(fx.Node, decision.data["node"])
    if "operand" in decision.data:
        _replace_operand(gm, node, decision)
        return
    replace_weight(gm, cast(fx.Node, node.args[1]), decision.data["weight"])
    bias = arg(node, "bias")
    if isinstance(bias, fx.Node):
        replace_weight(gm, bias, decision.data["bias"])
    elif decision.data["bias"].any():
        set_arg(node, "bias", new_weight(gm, node, f"{owner(node)}.bias", decision.data["bias"]))


def _transposed(gm: fx.GraphModule, node: fx.Node, facts: Facts) -> list[Decision]:
    """Of a transposed convolution's weight [I, O, taps], what reads zeros is cleared; no more is folded."""
    weight, bias = weight_of(gm, node.args[1]), weight_of(gm, arg(node, "bias"))
    if weight is None or not weight.isfinite().all():
        return []
    x = cast(fx.Node, node.args[0])
    channels = facts.summary(x, facts.value[x].dim() + 1 - weight.dim())
    zero = channels.constant & (channels.value == 0) & (weight != 0).flatten(1).any(1)
    if not zero.any():
        return []
    data = {"node": node, "weight": weight.masked_fill(zero.view(-1, *[1] * (weight.dim() - 1)), 0),
            "bias": weight.new_zeros(1) if bias is None else bias}  # fmt: skip
    what = f"clear {int(zero.sum())} columns that read zeros"
    return [Decision("fold_constants", owner(node), what, "the channels do not depend on the input", data=data)]


class _Fold:
    """The new weight and bias of one layer, in float64, and what was folded into them."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, facts: Facts) -> None:
        self.node, self.facts = node, facts
        self.old = cast(Tensor, weight_of(gm, node.args[1]))
        bias = weight_of(gm, arg(node, "bias"))
        self.old_bias = self.old.new_zeros(self.old.shape[0]) if bias is None else bias
        self.weight, self.bias = self.old.double().clone(), self.old_bias.double().clone()
        self.linear = node.target is aten.linear.default
        self.groups = 1 if self.linear else cast(int, arg(node, "groups"))
        self.done: list[str] = []
        self.left: list[str] = []

    def decide(self) -> list[Decision]:
        if not self.old.isfinite().all():  # 0 * inf is not 0
            why = "its weight holds inf or nan"
            return [Decision("fold_constants", owner(self.node), "fold constant channels", why, accepted=False)]
        channel = -1 if self.linear else 1 - self.old.dim()
        x = cast(fx.Node, self.node.args[0])
        self._columns(self.facts.summary(x, self.facts.value[x].dim() + channel))
        self._rows(self.facts.summary(self.node, self.facts.value[self.node].dim() + channel))
        where = owner(self.node)
        decisions = [
            Decision("fold_constants", where, "fold constant channels", why, accepted=False) for why in self.left
        ]
        weight, bias = self.weight.to(self.old.dtype), self.bias.to(self.old_bias.dtype)
        if self.done and not (torch.equal(weight, self.old) and torch.equal(bias, self.old_bias)):
            data = {"node": self.node, "weight": weight, "bias": bias}
            why = "the channels do not depend on the input"
            decisions.append(Decision("fold_constants", where, ", ".join(self.done), why, data=data))
        return decisions

    def _columns(self, channels: ChannelSummary) -> None:
        read = self._reads()
        zero = channels.constant & (channels.value == 0) & read
        if zero.any():
            self._clear(zero)
            self.done.append(f"clear {int(zero.sum())} columns that read zeros")
        constant = channels.constant & (channels.value != 0) & read
        varying = channels.known & ~channels.constant & read
        if self.linear and varying.any():  # differs over tokens: the sum would be one bias per token
            self.left.append(f"{int(varying.sum())} input features are known but differ over positions")
        elif varying.any():
            self.left.append(f"{int(varying.sum())} input channels are known but differ over positions (zero padding)")
        if constant.any():
            self._constants(constant, channels.value)

    def _constants(self, constant: Tensor, value: Tensor) -> None:
        count = int(constant.sum())
        if not _zero_padded(self.node):
            self.bias += self._tap_sums(constant) @ torch.where(constant, value, 0.0)
            self._clear(constant)
            self.done.append(f"fold {count} constant columns into the bias")
        elif self.groups > 1:
            self.left.append(f"{count} constant input channels meet zero padding in a grouped convolution")
        elif count > 1 or not constant[self._carrier()]:
            self._carry(constant, value)

    def _carry(self, constant: Tensor, value: Tensor) -> None:
        carrier = self._carrier()
        ratio = torch.where(constant, value / value[carrier], 0.0)
        merged = (self.weight * ratio.view(1, -1, *[1] * (self.weight.dim() - 2))).sum(1)
        self._clear(constant)
        self.weight[:, carrier] = merged
        self.done.append(f"let channel {carrier} carry {int(constant.sum())} constant columns past the zero padding")

    def _carrier(self) -> int:
        """The largest constant of the tensor: every reader picks the same, and dividing by it is safest."""
        x = cast(fx.Node, self.node.args[0])
        channels = self.facts.summary(x, self.facts.value[x].dim() + 1 - self.old.dim())
        return int(torch.where(channels.constant, channels.value, 0.0).abs().argmax())

    def _rows(self, channels: ChannelSummary) -> None:
        row = channels.constant & (self.weight.flatten(1) != 0).any(1)
        if row.any():
            self.weight[row] = 0
            self.bias = torch.where(row, channels.value, self.bias)
            self.done.append(f"write {int(row.sum())} constant rows as biases")

    def _grouped(self) -> Tensor:
        """Weight as [groups, rows per group, columns per group, taps]; a view."""
        return self.weight.view(self.groups, self.weight.shape[0] // self.groups, self.weight.shape[1], -1)

    def _reads(self) -> Tensor:
        """Bool [I]: some row has a weight for the channel."""
        return (self._grouped() != 0).any(3).any(1).flatten()

    def _clear(self, columns: Tensor) -> None:
        grouped = self._grouped()
        grouped.masked_fill_(columns.view(self.groups, 1, -1, 1), 0)

    def _tap_sums(self, columns: Tensor) -> Tensor:
        """[O, I] sums over taps; rows of other groups read nothing."""
        sums = self._grouped().sum(3)
        full = torch.zeros(self.weight.shape[0], len(columns), dtype=torch.float64, device=sums.device)
        rows, width = sums.shape[1], sums.shape[2]
        for g in range(self.groups):
            full[g * rows : (g + 1) * rows, g * width : (g + 1) * width] = sums[g]
        return full


def _zero_padded(node: fx.Node) -> bool:
    if node.target is aten.linear.default:
        return False
    padding = arg(node, "padding")
    if isinstance(padding, str):
        return padding != "valid"
    return any(p != 0 for p in ([padding] if isinstance(padding, int) else padding))


def _known_operands(gm: fx.GraphModule, node: fx.Node, facts: Facts) -> list[Decision]:
    """Replace an operand that is known in every element anyone needs; the other must have the output's shape.

    What is demanded of unknown elements does not change by folding known ones, so one look is enough.
    """
    decisions: list[Decision] = []
    if node.kwargs.get("alpha", 1) != 1 or node not in facts.unknown:
        return decisions
    for i, other in ((0, 1), (1, 0)):
        operand, rest = node.args[i], node.args[other]
        if not (isinstance(operand, fx.Node) and isinstance(rest, fx.Node)) or operand.op == "get_attr":
            continue
        if operand not in facts.unknown or rest not in facts.unknown:  # a size
            continue
        known = not some(_matters(facts, operand)) and some(_matters(facts, rest))
        if (
            known
            and facts.unknown[rest].shape == facts.unknown[node].shape
            and facts.value[operand].is_floating_point()
        ):
            value = smallest(facts.value[operand]).clone(memory_format=torch.contiguous_format)
            if any(value.shape[dim] > 1 for dim in symbolic_dims(operand)):  # repeated as often as there are samples
                continue
            what = f"replace what {owner(operand)} gives by a constant"
            data = {"node": node, "operand": i, "value": value}
            decisions.append(Decision("fold_constants", owner(node), what, "all of it is known", data=data))
    return decisions


def _matters(facts: Facts, node: fx.Node) -> Tensor:
    """Unknown elements that some output needs."""
    return facts.unknown[node] & facts.demanded[node]


def _replace_operand(gm: fx.GraphModule, node: fx.Node, decision: Decision) -> None:
    i, value = decision.data["operand"], cast(Tensor, decision.data["value"])
    rest = cast(fx.Node, node.args[1 - i])
    same = rest.meta["val"].dtype == node.meta["val"].dtype  # or the sum says what dtype comes of both
    if same and operator_name(node) in ("add", "sub") and not value.any() and (i == 1 or operator_name(node) == "add"):
        node.replace_all_uses_with(rest)
        gm.graph.erase_node(node)
        return
    operand = cast(fx.Node, node.args[i])
    constant = new_weight(gm, node, f"{owner(operand)}.constant", value.to(operand.meta["val"].dtype))
    constant.meta["val"] = operand.meta["val"]
    args = list(node.args)
    args[i] = constant
    node.args = tuple(args)
