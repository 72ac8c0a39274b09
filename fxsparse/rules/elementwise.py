"""Elementwise operators: y[p] = f(a[p], b[p], ...) with broadcasting.

y[p] is known when all its arguments are; y[p] needs all its arguments at p. Multiplication knows more: 0 * x = 0.
Where a function jumps, less is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.ir.bits import some
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import aten, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.rules.rule import Rule, Sample, reduce_to, tie_leading

ROUNDINGS = 16  # that a known value may have behind it in the model


class Elementwise(Rule):
    """Any deterministic function of the elements at one position."""

    ops: tuple[Any, ...] = (
        aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
        aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default, aten.elu.default,
        aten.relu6.default, aten.softplus.default, aten.mish.default, aten.clamp.default, aten.clamp_min.default,
        aten.clamp_max.default, aten.neg.default, aten.abs.default, aten.exp.default, aten.log.default,
        aten.sqrt.default, aten.rsqrt.default, aten.sin.default, aten.cos.default, aten.erf.default,
        aten.reciprocal.default, aten.clone.default, aten.add.Tensor, aten.add.Scalar,
        aten.sub.Tensor, aten.sub.Scalar, aten.div.Tensor, aten.div.Scalar, aten.mul.Scalar,
        aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.maximum.default, aten.minimum.default,
        aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.masked_fill.Scalar,
        aten.leaky_relu.default, aten.selu.default, aten.celu.default, aten.log_sigmoid.default,
        aten.softshrink.default, aten.square.default,
        aten.rsub.Scalar, aten.rsub.Tensor, aten.addcmul.default, aten.addcdiv.default, aten.lerp.Scalar,
        aten.lerp.Tensor, aten.pow.Scalar, aten.clamp.Tensor, aten.exp2.default, aten.expm1.default,
        aten.log1p.default, aten.log2.default, aten.log10.default, aten.tan.default, aten.atan.default,
        aten.sinh.default, aten.cosh.default, aten.erfc.default, aten.nan_to_num.default, aten.hypot.default,
        aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.bitwise_not.default,
        aten.bitwise_and.Tensor, aten.bitwise_or.Tensor,
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
        yield Sample(lambda x, y: torch.addcmul(1 - x, F.leaky_relu(y), x, value=0.5), ((2, 3, 4), (2, 3, 4)))


class Jump(Elementwise):
    """Functions that jump, such as a threshold: known where rounding what they read cannot turn the result over.

    Facts are in float64, and the model in its dtype takes 0.7 for 0.699999988: it may be on the jump's other side.
    """

    ops = (
        aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.eq.Tensor,
        aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.sign.default,
        aten.sgn.default, aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default,
        aten.frac.default, aten.fmod.Scalar, aten.remainder.Scalar, aten.div.Tensor_mode, aten.atan2.default,
        aten.threshold.default, aten.hardshrink.default, aten._to_copy.default,
    )  # fmt: skip

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        bits = super().unknown(node, facts)
        if node.target is aten._to_copy.default and facts.value[node].is_floating_point():
            return bits
        inputs = [n for n in node.all_input_nodes if n in facts.unknown and facts.value[n].is_floating_point()]
        side = cast(Callable[..., Tensor], _SIDES.get(node.target, node.target))

        def moved(up: int) -> Tensor:  # of two inputs one is moved up, the other down
            at = {n: _moved(n, facts, -up if i else up) for i, n in enumerate(inputs)}
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: at[n] if n in at else facts.operand(n))
            return side(*args, **kwargs)

        return bits | (moved(1) != moved(-1))

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x, y: torch.where(x.lt(y) & ~(y >= 0.5), 2.0, x.lerp(y, 0.3)), ((2, 3, 4), (2, 3, 4)))
        yield Sample(lambda x: torch.floor(x * 3) + (x > 0.5).to(x), ((2, 5, 3, 3),))
        yield Sample(lambda x, y: torch.atan2(x, y - 1) + F.hardshrink(x) + torch.sign(y), ((2, 3, 4), (2, 3, 4)))


# What says on which side of a jump something is, where the jump is a point.
_SIDES: dict[Any, Any] = {
    aten.eq.Scalar: aten.lt.Scalar, aten.ne.Scalar: aten.lt.Scalar,
    aten.eq.Tensor: aten.lt.Tensor, aten.ne.Tensor: aten.lt.Tensor,
}  # fmt: skip


def _moved(node: fx.Node, facts: Facts, up: int) -> Tensor:
    """The value of `node` off by some roundings of its dtype. A zero stays one, but may have lost its sign."""
    moved: Tensor = facts.operand(node) * (1 + up * ROUNDINGS * torch.finfo(node.meta["val"].dtype).eps)
    return torch.where(moved == 0, -moved if up < 0 else moved, moved)


class Multiply(Elementwise):
    """y = a * b: y is known to be 0 where either factor is.

    The other factor is needed even so: made from what is left of its inputs it may overflow, and 0 * inf is not 0.
    """

    ops = (aten.mul.Tensor,)

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        a, b = node.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return super().unknown(node, facts)
        return (facts.unknown[a] & facts.nonzero(b)) | (facts.nonzero(a) & facts.unknown[b])

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x, y: x * torch.sigmoid(y), ((2, 5, 3, 3), (2, 5, 1, 1)))
        yield Sample(lambda x, y: x * y, ((2, 3, 4), (2, 3, 4)))
        yield Sample(lambda x: x * x * 0.5, ((2, 6),))


class PRelu(Elementwise):
    """max(x, 0) + a min(x, 0), with one `a` or one for each channel (dimension 1)."""

    ops = (aten.prelu.default,)

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        x, a = node.args
        return {x: demanded, a: torch.ones_like(facts.unknown[a])}  # type: ignore[dict-item, index]

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        x, a = node.args
        return facts.unknown[x] if not some(facts.unknown[a]) else Rule.unknown(self, node, facts)  # type: ignore[index]

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        x, a = cast("tuple[fx.Node, fx.Node]", node.args)
        tie_leading(node, x, layout, range(len(layout.kept[node])))
        if layout.kept[a] and len(layout.kept[a][0]) > 1:
            layout.tie(node, 1, a, 0, "")
        else:
            layout.pin(a, "")

    def samples(self) -> Iterable[Sample]:
        a = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
        yield Sample(lambda x: F.prelu(x, a.to(x)), ((2, 4, 3, 3),))
        yield Sample(lambda x: F.prelu(x, a[:1].to(x)), ((2, 3, 4),))
