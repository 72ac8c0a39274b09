"""Elementwise operators: y[p] = f(a[p], b[p], ...) with broadcasting.

y[p] is known when all its arguments are; y[p] needs all its arguments at p. Multiplication knows more: 0 * x = 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import aten, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.rules.rule import Rule, Sample, reduce_to


class Elementwise(Rule):
    """Any deterministic function of the elements at one position."""

    ops: tuple[Any, ...] = (
        aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
        aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default, aten.elu.default,
        aten.relu6.default, aten.softplus.default, aten.mish.default, aten.clamp.default, aten.clamp_min.default,
        aten.clamp_max.default, aten.neg.default, aten.abs.default, aten.exp.default, aten.log.default,
        aten.sqrt.default, aten.rsqrt.default, aten.sin.default, aten.cos.default, aten.erf.default,
        aten.reciprocal.default, aten._to_copy.default, aten.clone.default, aten.add.Tensor, aten.add.Scalar,
        aten.sub.Tensor, aten.sub.Scalar, aten.div.Tensor, aten.div.Scalar, aten.mul.Scalar,
        aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.maximum.default, aten.minimum.default,
        aten.where.self, aten.masked_fill.Scalar,
    )  # fmt: skip

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        bits = [facts.unknown[n] for n in node.all_input_nodes if n in facts.unknown]
        out = torch.zeros_like(facts.value[node], dtype=torch.bool)
        for b in bits:
            out = out | b
        return out

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        inputs = [n for n in node.all_input_nodes if n in facts.unknown]
        return {n: reduce_to(demanded, facts.unknown[n].shape) for n in inputs}

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        inputs = [n for n in node.all_input_nodes if n in layout.kept]
        for n in inputs:
            offset = len(layout.kept[node]) - len(layout.kept[n])
            others = [owner(m) for m in inputs if m is not n and m.op != "get_attr"]
            cause = f"coupled with {', '.join(others)} by {operator_name(node)}" if others else ""
            for dim, size in enumerate(layout.shape(n)):
                if size == layout.shape(node)[dim + offset]:
                    layout.tie(n, dim, node, dim + offset, cause)
                else:  # size 1, broadcast
                    layout.pin(n, "", [dim])

    def samples(self) -> Iterable[Sample]:
        yield Sample(torch.relu, ((2, 5, 3, 3),))
        yield Sample(torch.nn.functional.hardswish, ((2, 6),))
        yield Sample(lambda x: torch.sigmoid(x) + 1, ((2, 4, 2, 2),))
        yield Sample(lambda x, y: x + y, ((2, 5, 3, 3), (2, 5, 3, 3)))
        yield Sample(lambda x, y: x - 2 * y, ((2, 5, 3, 3), (2, 5, 1, 1)))
        yield Sample(torch.maximum, ((2, 3, 4), (2, 3, 4)))
        yield Sample(lambda x, y: torch.where(y > 0, x, y), ((2, 3, 4), (2, 3, 4)))


class Multiply(Elementwise):
    """y = a * b: y is known to be 0 where either factor is; where one factor is 0 the other is not needed."""

    ops = (aten.mul.Tensor,)

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        a, b = node.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return super().unknown(node, facts)
        return (facts.unknown[a] & facts.nonzero(b)) | (facts.nonzero(a) & facts.unknown[b])

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        a, b = node.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
            return super().demand(node, facts, demanded)
        return {n: reduce_to(demanded & facts.nonzero(other), facts.unknown[n].shape) for n, other in ((a, b), (b, a))}

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x, y: x * torch.sigmoid(y), ((2, 5, 3, 3), (2, 5, 1, 1)))
        yield Sample(lambda x, y: x * y, ((2, 3, 4), (2, 3, 4)))
        yield Sample(lambda x: x * x * 0.5, ((2, 6),))
