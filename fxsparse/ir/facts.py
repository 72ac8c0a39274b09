"""What is known about the elements of every value of a graph, whatever the input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.ir.bits import any_along
from fxsparse.ir.lines import Lines

# Values are propagated in float64; channels whose positions agree to this are one constant.
CONSTANT_TOLERANCE = 1e-11


@dataclass(frozen=True)
class ChannelSummary:
    """One dimension of a value, per index: is it known, is it one constant, which one.

    known     bool [C], no position depends on the input
    constant  bool [C], known and equal at all positions
    value     float64 [C], the constant (0 where it is not one)
    """

    known: Tensor
    constant: Tensor
    value: Tensor

    def kind(self, index: int) -> str:
        """`ZERO`, `CONST`, `PCONST` (known, differs over positions) or `VAR`."""
        if not self.known[index]:
            return "VAR"
        if not self.constant[index]:
            return "PCONST"
        return "ZERO" if self.value[index] == 0 else "CONST"


@dataclass
class Facts:
    """Element facts of one graph at batch 1, by fx node. Tensors have the node's own shape.

    unknown   bool, the element depends on the input
    value     float64 (integers as they are, weights in their own dtype): the value of known elements, 0 at unknown ones
    demanded  bool, some output needs the element to be there with its value
    index     for data movement: int32 or int64 [out shape], flat position in the concatenated inputs, -1 for padding
    lines     for data movement: the same without the dimensions that pass through
    """

    unknown: dict[fx.Node, Tensor] = field(default_factory=dict)
    value: dict[fx.Node, Any] = field(default_factory=dict)
    demanded: dict[fx.Node, Tensor] = field(default_factory=dict)
    index: dict[fx.Node, Tensor] = field(default_factory=dict)
    lines: dict[fx.Node, Lines] = field(default_factory=dict)

    def operand(self, node: fx.Node) -> Any:
        """The value for an operator to run on: in float64, and with memory for every element."""
        value = self.value[node]
        if not isinstance(value, Tensor):
            return value
        value = value.double() if value.is_floating_point() else value
        return value.contiguous() if 0 in value.stride() else value

    def nonzero(self, node: fx.Node) -> Tensor:
        """bool: the element can be something other than 0."""
        value: Tensor = self.value[node]
        return self.unknown[node] | (value != 0)

    def summary(self, node: fx.Node, dim: int) -> ChannelSummary:
        """The facts of `node` along `dim`, over all other dimensions."""
        known = ~any_along(_rows(self.unknown[node], dim), 1)
        value = _rows(self.value[node], dim).double()
        low, high = value.amin(1), value.amax(1)
        scale = torch.maximum(low.abs(), high.abs())
        constant = known & (high - low <= CONSTANT_TOLERANCE * scale)
        return ChannelSummary(known, constant, torch.where(constant, value[:, 0], 0.0))


def smallest(tensor: Tensor) -> Tensor:
    """`tensor` with every dimension along which it does not change cut to 1: it broadcasts back."""
    for dim, size in enumerate(tensor.shape):
        if size > 1:
            first, second = tensor.narrow(dim, 0, 1), tensor.narrow(dim, 1, 1)
            if torch.equal(first, second) and bool((tensor == first).all()):
                tensor = first
    return tensor


def _rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
