"""Pooling and interpolation: every output is a non-negative combination of a window of one channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.ir.bits import any_along
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, aten
from fxsparse.ir.layout import Layout
from fxsparse.ir.symbols import symbolic_dims
from fxsparse.rules.rule import Rule, Sample, run, tie_leading, vjp


class AveragePool(Rule):
    """Linear windows: the operator itself tells, run on the bits."""

    spatial = 2
    at_any_size = True
    ops: tuple[Any, ...] = (
        aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.upsample_nearest2d.vec,
        aten._upsample_nearest_exact2d.vec, aten.upsample_bilinear2d.vec,
    )  # fmt: skip

    def mixed(self, node: fx.Node, rank: int) -> list[int]:
        return list(range(rank - self.spatial, rank))

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        (x,) = [n for n in node.all_input_nodes if n in facts.unknown]
        found = self._reached(node, facts, x)
        if {*symbolic_dims(x)}.isdisjoint(self.mixed(node, found.dim())):
            return found
        varies: Tensor = facts.value[node] != 0  # how much padding a constant meets depends on the size
        return found | varies

    def _reached(self, node: fx.Node, facts: Facts, x: fx.Node) -> Tensor:
        """Outputs that an unknown element of x goes into."""
        return self._sums(node, facts, x, facts.unknown[x].float()) > 0

    def _sums(self, node: fx.Node, facts: Facts, x: fx.Node, bits: Tensor) -> Tensor:
        """Positive where `bits` in the place of x go: a divisor of the user's own may be negative."""
        return cast(Tensor, run(node, facts, {x: bits}, {"divisor_override": None}))

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        (x,) = [n for n in node.all_input_nodes if n in facts.unknown]
        return {x: vjp(lambda t: self._sums(node, facts, x, t), facts.unknown[x], demanded)}

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        (x,) = [n for n in node.all_input_nodes if n in layout.kept]
        rank = len(layout.kept[node])
        tie_leading(node, x, layout, range(rank - self.spatial))
        for n in (x, node):
            layout.pin(n, "", range(rank - self.spatial, rank))

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: F.avg_pool2d(x, 3, 2, 1), ((2, 4, 5, 7),))
        yield Sample(lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False), ((2, 3, 5, 5),))
        yield Sample(lambda x: F.avg_pool2d(x, 2, divisor_override=-3), ((2, 4, 5, 5),))
        yield Sample(lambda x: F.adaptive_avg_pool2d(x, (2, 3)), ((2, 4, 5, 5),))
        yield Sample(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), ((2, 3, 2, 3),))
        yield Sample(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), ((2, 3, 2, 3),))


class AveragePool1d(AveragePool):
    """The same in one dimension."""

    spatial = 1
    ops: tuple[Any, ...] = (
        aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default, aten.upsample_nearest1d.vec,
        aten._upsample_nearest_exact1d.vec, aten.upsample_linear1d.vec,
    )  # fmt: skip

    def samples(self) -> Iterable[Sample]:  # channels last, as all samples of three dimensions
        yield Sample(lambda x: F.avg_pool1d(x.mT, 3, 2, 1).mT, ((2, 7, 4),))
        yield Sample(lambda x: F.interpolate(x.mT, scale_factor=2.0, mode="linear").mT, ((2, 3, 4),))


class AveragePool3d(AveragePool):
    """In three dimensions."""

    spatial = 3
    ops: tuple[Any, ...] = (
        aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default, aten.upsample_nearest3d.vec,
        aten._upsample_nearest_exact3d.vec, aten.upsample_trilinear3d.vec,
    )  # fmt: skip

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: F.avg_pool3d(x.movedim(-1, 1), 2).movedim(1, -1), ((2, 4, 2, 5, 3),))
        yield Sample(lambda x: F.interpolate(x.movedim(-1, 1), scale_factor=2.0).movedim(1, -1), ((2, 2, 1, 2, 3),))


class WholeImage(AveragePool):
    """Windows that the bits cannot tell: every position of a channel of which one is demanded. Channels are whole."""

    ops: tuple[Any, ...] = ()

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        (x,) = [n for n in node.all_input_nodes if n in facts.unknown]
        return {x: self._anywhere(demanded).expand_as(facts.unknown[x])}

    def _anywhere(self, bits: Tensor) -> Tensor:
        return any_along(bits, list(range(-self.spatial, 0)), keepdim=True)


class Bicubic(WholeImage):
    """Weights of both signs, in which bits could cancel."""

    ops = (aten.upsample_bicubic2d.vec,)

    def _reached(self, node: fx.Node, facts: Facts, x: fx.Node) -> Tensor:
        return self._anywhere(facts.unknown[x]).expand_as(facts.value[node])

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: F.interpolate(x, size=(7, 4), mode="bicubic"), ((2, 4, 5, 6),))


class MaxPool(WholeImage):
    """The maximum of a window; padding is -inf, so a constant stays constant."""

    ops = (aten.max_pool2d.default,)

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: F.max_pool2d(x, 3, 2, 1), ((2, 4, 5, 7),))
        yield Sample(lambda x: F.max_pool2d(x, 2, 2, 0, 2), ((2, 3, 6, 6),))


class MaxPool1d(MaxPool):
    """In one dimension."""

    spatial = 1
    ops = (aten.max_pool1d.default,)

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: F.max_pool1d(x.mT, 3, 2, 1).mT, ((2, 7, 4),))


class MaxPool3d(MaxPool):
    """In three."""

    spatial = 3
    ops = (aten.max_pool3d.default,)

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: F.max_pool3d(x.movedim(-1, 1), 2).movedim(1, -1), ((2, 4, 2, 5, 3),))


class Reduction(Rule):
    """One number from all elements along some dimensions: known when all of them are; needs all of them."""

    ops = (
        aten.mean.dim, aten.sum.dim_IntList, aten.prod.dim_int, aten.amax.default, aten.amin.default, aten.var.dim,
        aten.var.correction, aten.std.dim, aten.std.correction, aten.linalg_vector_norm.default,
        aten.logsumexp.default, aten.argmax.default, aten.argmin.default, aten.any.dim, aten.all.dim,
    )  # fmt: skip
    positions = (aten.argmax.default, aten.argmin.default)  # they return

    def mixed(self, node: fx.Node, rank: int) -> list[int]:
        dims = arg(node, "dim")
        dims = [dims] if isinstance(dims, int) else dims
        return sorted({d % rank for d in dims}) if dims else list(range(rank))

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        (x,) = [n for n in node.all_input_nodes if n in facts.unknown]
        dims = self.mixed(node, facts.unknown[x].dim())
        if node.target in self.positions:  # rounding may move the largest
            return torch.ones_like(facts.value[node], dtype=torch.bool)
        return any_along(facts.unknown[x], dims, keepdim=bool(arg(node, "keepdim")))

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        (x,) = [n for n in node.all_input_nodes if n in facts.unknown]
        if not arg(node, "keepdim"):
            for dim in self.mixed(node, facts.unknown[x].dim()):
                demanded = demanded.unsqueeze(dim)
        return {x: demanded.expand_as(facts.unknown[x])}

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        (x,) = [n for n in node.all_input_nodes if n in layout.kept]
        reduced = self.mixed(node, len(layout.kept[x]))
        layout.pin(x, f"{node.name} divides by or reduces over the whole dimension", reduced)
        kept = [d for d in range(len(layout.kept[x])) if d not in reduced]
        if arg(node, "keepdim"):
            layout.pin(node, "", reduced)
            tie_leading(node, x, layout, kept)
        else:
            for position, dim in enumerate(kept):
                layout.tie(x, dim, node, position, "")

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: x.mean((2, 3)), ((2, 4, 3, 3),))
        yield Sample(lambda x: x.mean((2, 3), keepdim=True), ((2, 4, 3, 3),))
        yield Sample(lambda x: x.sum(1), ((2, 4, 5),))
        yield Sample(lambda x: x.amax(-1, keepdim=True), ((2, 4, 5),))
        yield Sample(lambda x: torch.linalg.vector_norm(x, dim=1), ((2, 3, 5),))
        yield Sample(
            lambda x: torch.std(x, (2, 3), keepdim=True) + torch.var(x, 1, correction=0, keepdim=True), ((2, 4, 3, 3),)
        )
        yield Sample(lambda x: x.argmax(-1, keepdim=True) * x.amin(-1, keepdim=True), ((2, 4, 5),))
        yield Sample(lambda x: x.argmax(1) + torch.logsumexp(x, 1) * (x > 0.3).any(1), ((2, 4, 5),))
