"""Convolution and matrix products: y[n, o, p] = sum over i, t of w[o, i, t] * x[n, i, p + t] (+ b[o]).

y[o, p] is unknown when some unknown x meets a weight that is not 0; zero padding is a known 0, so borders come out
right by themselves. x[i, q] is demanded when a demanded y[o, p] meets it through a weight that is not 0.
A dimension of w is cut with the channels it reads (i) or writes (o). Groups: see `_couple_groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.ir.bits import some
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, aten, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.ir.symbols import rank_of, symbolic_dims
from fxsparse.rules.rule import Rule, Sample, run, tie_leading, vjp


class Contraction(Rule):
    """What convolution, linear and matrix products share: bilinear in two operands, with an optional bias."""

    def operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The two factors."""
        return node.args[0], node.args[1]  # type: ignore[return-value]

    def bias(self, node: fx.Node) -> fx.Node | None:
        """The added vector, if any."""
        bias = arg(node, "bias")
        return bias if isinstance(bias, fx.Node) else None

    def mixed(self, node: fx.Node, rank: int) -> list[int]:
        return [rank - 1]

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        x, w = self.operands(node)
        out = self._product(node, facts, {x: facts.unknown[x].float(), w: facts.nonzero(w).float()}) > 0.5
        if some(facts.unknown[w]):
            out = out | (self._product(node, facts, {x: facts.nonzero(x).float(), w: facts.unknown[w].float()}) > 0.5)
        bias = self.bias(node)
        if bias is not None and some(facts.unknown[bias]):
            out = torch.ones_like(out)
        return out

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        result = {n: torch.ones_like(facts.unknown[n]) for n in node.all_input_nodes if n in facts.unknown}
        x, w = self.operands(node)
        if x is not w:
            for n, other in ((x, w), (w, x)):
                if n.op != "get_attr":  # whoever cuts a weight asks for its layout, not for its elements
                    result[n] = self._pull(node, facts, n, other, demanded)
        return result

    def _pull(self, node: fx.Node, facts: Facts, n: fx.Node, other: fx.Node, demanded: Tensor) -> Tensor:
        weight = facts.nonzero(other).float()
        return vjp(lambda t: self._product(node, facts, {n: t, other: weight}), facts.unknown[n], demanded)

    def _product(self, node: fx.Node, facts: Facts, replace: dict[fx.Node, Tensor]) -> Tensor:
        bias = self.bias(node)
        if bias is not None:
            replace = {**replace, bias: torch.zeros_like(facts.value[bias], dtype=torch.float32)}
        return run(node, facts, replace)  # type: ignore[no-any-return]


class Window(Contraction):
    """What convolution and its transpose share: every output reads a window, which in some places leaves the image."""

    contract: Callable[..., Tensor]  # over channels, for one tap and one place

    def mixed(self, node: fx.Node, rank: int) -> list[int]:
        return []  # positions: `_product`

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        x, w = self.operands(node)
        if not self._any_size(x, w):
            return super().unknown(node, facts)
        met = self._product(node, facts, {x: facts.nonzero(x).float(), w: facts.nonzero(w).float()})
        bias = self.bias(node)  # a constant meets padding in some places, in how many depends on the size
        return met > 0.5 if bias is None or not some(facts.unknown[bias]) else torch.ones_like(met, dtype=torch.bool)

    def _any_size(self, x: fx.Node, w: fx.Node) -> bool:
        return not {*symbolic_dims(x)}.isdisjoint(range(rank_of(x) - rank_of(w) + 2, rank_of(x)))

    def _product(self, node: fx.Node, facts: Facts, replace: dict[fx.Node, Tensor]) -> Tensor:
        """In an image of any size every tap meets every place."""
        x, w = self.operands(node)
        if not self._any_size(x, w):
            return super()._product(node, facts, replace)
        places = range(2 - rank_of(w), 0)
        sums = [replace[n].sum(tuple(places)).unsqueeze(-1) for n in (x, w)]
        y = type(self).contract(sums[0], sums[1], groups=arg(node, "groups"))
        return y.view(*y.shape, *[1] * (len(places) - 1)).expand(facts.value[node].shape)


class Convolution(Window):
    """conv1d, conv2d, conv3d; any stride, padding and dilation."""

    contract = F.conv1d
    ops = (
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    )  # fmt: skip

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        x, w = self.operands(node)
        bias = self.bias(node)
        channel = len(layout.kept[node]) - len(layout.kept[w]) + 1
        if w.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            super().couple(node, facts, layout)
            return
        for n in (x, node):
            layout.pin(n, "", [d for d in range(len(layout.kept[n])) if d > channel])
        layout.pin(w, "", range(2, len(layout.kept[w])))
        tie_leading(node, x, layout, range(channel))
        layout.tie(node, channel, w, 0, "")
        if bias is not None:
            layout.tie(node, channel, bias, 0, "")
        if arg(node, "groups") == 1:
            layout.tie(x, channel, w, 1, "")
        else:
            self._couple_groups(node, x, w, channel, layout)

    def _couple_groups(self, node: fx.Node, x: fx.Node, w: fx.Node, channel: int, layout: Layout) -> None:
        """A group stays whole or goes whole: groups must stay equal. Depthwise is the case of one channel a group."""
        groups = arg(node, "groups")
        ins, outs = layout.kept[x][channel].view(groups, -1), layout.kept[node][channel].view(groups, -1)
        alive = ins.any(1) | outs.any(1)
        if int(alive.sum()) == 1:
            self._couple_last_group(int(alive.int().argmax()), groups, x, w, channel, layout)
            return
        cause = f"grouped convolution {owner(node)}: a group stays whole"
        layout.grow(x, channel, alive.repeat_interleave(ins.shape[1]), cause)
        layout.grow(node, channel, alive.repeat_interleave(outs.shape[1]), cause)
        if alive.any():
            layout.pin(w, cause, [1])

    def _couple_last_group(self, g: int, groups: int, x: fx.Node, w: fx.Node, channel: int, layout: Layout) -> None:
        """One group left: an ordinary convolution over that group's channels."""
        width = len(layout.kept[w][1])
        own = torch.zeros(groups, width, dtype=torch.bool, device="cpu")
        own[g] = layout.kept[w][1]
        layout.grow(x, channel, own.flatten(), "")
        layout.grow(w, 1, layout.kept[x][channel].view(groups, width)[g], "")

    def rewrite(self, node: fx.Node, facts: Facts, layout: Layout) -> dict[str, Any]:
        groups = arg(node, "groups")
        if groups == 1:
            return {}
        x, w = self.operands(node)
        channel = len(layout.kept[node]) - len(layout.kept[w]) + 1
        kept = int(layout.kept[x][channel].view(groups, -1).any(1).sum())
        return {"groups": kept} if kept != groups else {}

    def samples(self) -> Iterable[Sample]:
        g = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            w = torch.randn(shape, generator=g, dtype=torch.float64)
            w[torch.rand(shape, generator=g) < 0.3] = 0
            return w

        w3, w1, wd, wg = weight(4, 5, 3, 3), weight(6, 5, 1, 1), weight(5, 1, 3, 3), weight(4, 3, 3, 3)
        b = weight(4)
        yield Sample(lambda x: F.conv2d(x, w3.to(x), b.to(x), padding=1), ((2, 5, 4, 5),))
        yield Sample(lambda x: F.conv2d(x, w3.to(x), stride=2, padding=2, dilation=2), ((2, 5, 7, 6),))
        yield Sample(lambda x: F.conv2d(x, w1.to(x)), ((2, 5, 3, 3),))
        yield Sample(lambda x: F.conv2d(x, wd.to(x), padding=1, groups=5), ((2, 5, 4, 4),))
        yield Sample(lambda x: F.conv2d(x, wg.to(x), groups=2), ((2, 6, 4, 4),))
        yield Sample(lambda x: F.conv2d(x, w3.to(x), padding="same"), ((2, 5, 1, 1),))


class TransposedConvolution(Window):
    """conv_transpose1d, 2d, 3d without groups; the weight is [I, O, taps]."""

    contract = F.conv_transpose1d
    ops = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        x, w = self.operands(node)
        bias = self.bias(node)
        stored = w.op == "get_attr" and (bias is None or bias.op == "get_attr")
        if not stored or arg(node, "groups") != 1:
            super().couple(node, facts, layout)
            return
        channel = len(layout.kept[node]) - len(layout.kept[w]) + 1
        for n in (x, node):
            layout.pin(n, "", range(channel + 1, len(layout.kept[n])))
        layout.pin(w, "", range(2, len(layout.kept[w])))
        tie_leading(node, x, layout, range(channel))
        layout.tie(x, channel, w, 0, "")
        layout.tie(node, channel, w, 1, "")
        if bias is not None:
            layout.tie(node, channel, bias, 0, "")

    def samples(self) -> Iterable[Sample]:
        w = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        w[2], w[:, 1] = 0, 0
        yield Sample(lambda x: F.conv_transpose2d(x, w.to(x), w[:4, 0, 0, 0].to(x), 2, 1), ((2, 5, 3, 4),))
        yield Sample(lambda x: F.conv_transpose2d(x, w.to(x), output_padding=1, stride=2), ((2, 5, 2, 3),))


class Linear(Contraction):
    """y[..., o] = sum over i of w[o, i] * x[..., i] + b[o]."""

    ops = (aten.linear.default,)

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        x, w = self.operands(node)
        bias = self.bias(node)
        if w.op != "get_attr" or len(layout.kept[w]) != 2 or (bias is not None and bias.op != "get_attr"):
            super().couple(node, facts, layout)
            return
        tie_leading(node, x, layout, range(len(layout.kept[x]) - 1))
        layout.tie(x, -1, w, 1, "")
        layout.tie(node, -1, w, 0, "")
        if bias is not None:
            layout.tie(node, -1, bias, 0, "")

    def samples(self) -> Iterable[Sample]:
        w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        w[:, 2] = 0
        w[1] = 0
        yield Sample(lambda x: F.linear(x, w.to(x)), ((2, 6),))
        yield Sample(lambda x: F.linear(x, w.to(x), w[:, 0].to(x)), ((2, 3, 6),))


class MatMul(Contraction):
    """y[..., m, n] = sum over k of a[..., m, k] * b[..., k, n]; both operands of the same rank, batches equal."""

    ops = (aten.matmul.default, aten.bmm.default, aten.mm.default)

    def bias(self, node: fx.Node) -> None:
        return None

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        a, b = self.operands(node)
        rank = len(layout.kept[node])
        if rank < 2 or not layout.shape(a)[:-2] == layout.shape(b)[:-2] == layout.shape(node)[:-2]:
            super().couple(node, facts, layout)
            return
        cause = f"coupled by {operator_name(node)} ({owner(node)})"
        for dim in range(rank - 2):
            layout.tie(a, dim, node, dim, cause)
            layout.tie(b, dim, node, dim, cause)
        layout.tie(a, -1, b, -2, cause)
        layout.tie(a, -2, node, -2, cause)
        layout.tie(b, -1, node, -1, cause)

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda a, b: a @ b.transpose(1, 2), ((2, 3, 5), (2, 4, 5)))
