"""Data movement: every output element is one input element (or padding). No algebra at all.

Running the operator on the integers 0, 1, 2 ... says where each element comes from; facts and demands follow that map.
A layout fits when the map takes the kept rectangle of the inputs to a rectangle of the output, and the operator with
its rewritten sizes, run on the kept integers alone, gives that same rectangle: this is checked, not trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.ir.bits import whole
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, aten, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.ir.lines import Lines, lines_of
from fxsparse.ir.symbols import RESHAPES, crossing
from fxsparse.rules.rule import Rule, Sample, run


class Movement(Rule):
    """view, permute, slice, cat and their kin."""

    ops = (
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.permute.default, aten.transpose.int, aten.t.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
        aten.cat.default, aten.stack.default, aten.flip.default, aten.roll.default, aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.repeat.default,
        aten.constant_pad_nd.default, aten.pad.default, aten.slice_scatter.default, aten.select_scatter.default,
    )  # fmt: skip

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        return _followed([facts.unknown[n] for n in _sources(node, facts)], self._map(node, facts))

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        sources = _sources(node, facts)
        sizes = [facts.unknown[n].numel() for n in sources]
        chosen = _scatter(self._map(node, facts)[demanded], sum(sizes))
        parts = chosen.to(demanded.device).split(sizes)
        mixed = crossing(node)[0]
        found = zip(sources, parts, strict=True)
        return {n: whole(bits.view(facts.unknown[n].shape), mixed) for n, bits in found}

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        cause = f"coupled by {operator_name(node)} ({owner(node)})"
        self._pin_symbolic(node, layout, cause)
        sources = _sources(node, facts)
        for n, mixed in zip((sources[0], node), crossing(node), strict=True):
            layout.pin(n, f"{operator_name(node)} ({owner(node)}) mixes it with the batch or another open size", mixed)
        lines = self._lines(node, facts)
        kept = [layout.rectangle(n, lines.dims(i)) for i, n in enumerate(sources)]
        moved = _followed(kept, lines.index)
        for i, n in enumerate(sources):
            like = {dim: layout.kept[n][dims[i]] for dim, dims in lines.through.items()}
            layout.grow_elements(node, moved & lines.of_source(i), cause, like)
        chosen = _scatter(lines.index[layout.rectangle(node, lines.through)], sum(lines.sizes))
        for i, (n, part) in enumerate(zip(sources, chosen.split(lines.sizes), strict=True)):
            like = {dims[i]: layout.kept[node][dim] for dim, dims in lines.through.items()}
            layout.grow_elements(n, part.view(lines.shapes[i]), cause, like)

    def settle(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        """Pin inputs and output when the operator cannot be cut to the layout. Called when nothing grows any more."""
        if not self._fits(node, facts, layout):
            for n in [node, *_sources(node, facts)]:
                layout.pin(n, f"{operator_name(node)} ({owner(node)}) cannot be cut there")

    def rewrite(self, node: fx.Node, facts: Facts, layout: Layout) -> dict[str, Any]:
        rewriter = _REWRITE.get(node.target)
        return rewriter(node, layout) if rewriter else {}

    def _map(self, node: fx.Node, facts: Facts) -> Tensor:
        if node not in facts.index:
            sources, start, iotas = _sources(node, facts), 0, {}
            for n in sources:  # float64 counts exactly to 2**53, and every movement operator takes it
                bits = facts.unknown[n]
                iotas[n] = torch.arange(start, start + bits.numel(), dtype=torch.float64, device=bits.device)
                iotas[n] = iotas[n].view(bits.shape)
                start += bits.numel()
            dtype = torch.int32 if start < 2**31 else torch.int64
            facts.index[node] = self._move(node, facts, iotas, {}).to(dtype)
        return facts.index[node]

    def _lines(self, node: fx.Node, facts: Facts) -> Lines:
        if node not in facts.lines:
            shapes = [facts.unknown[n].shape for n in _sources(node, facts)]
            facts.lines[node] = lines_of(self._map(node, facts).cpu(), shapes)
        return facts.lines[node]

    def _move(
        self, node: fx.Node, facts: Facts, tensors: Mapping[fx.Node, Tensor], changes: Mapping[str, Any]
    ) -> Tensor:
        if node.target is aten.constant_pad_nd.default:
            changes = {**changes, "value": -1.0}
        return cast(Tensor, run(node, facts, tensors, changes))

    def _fits(self, node: fx.Node, facts: Facts, layout: Layout) -> bool:
        """Run the rewritten operator on the kept integers and compare."""
        if all(layout.full(n, d) for n in [node, *_sources(node, facts)] for d in range(len(layout.kept[n]))):
            return True
        sources, start, iotas = _sources(node, facts), 0, {}
        for n in sources:
            shape = layout.shape(n)
            stop = start + facts.unknown[n].numel()
            iota = torch.arange(start, stop, dtype=torch.float64, device="cpu").view(shape)
            iotas[n] = iota[layout.rectangle(n)].view(layout.new_shape(n))
            start += iota.numel()
        expected = self._map(node, facts).cpu()[layout.rectangle(node)].view(layout.new_shape(node))
        try:
            changes = self.rewrite(node, facts, layout)
            return torch.equal(self._move(node, facts, iotas, changes).to(expected.dtype), expected)
        except (RuntimeError, IndexError, ValueError):
            return False

    def _pin_symbolic(self, node: fx.Node, layout: Layout, cause: str) -> None:
        """A size that is computed at run time (the batch) is not ours to rewrite."""
        sizes = node.args[1] if node.target in SIZED else []
        for dim, size in enumerate(cast("list[object]", sizes)):
            if isinstance(size, fx.Node):
                layout.pin(node, cause, [dim])

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: x.flatten(1), ((2, 4, 2, 3),))
        yield Sample(lambda x: x.flatten(1), ((2, 3, 4),))
        yield Sample(lambda x: x.flatten(1), ((2, 1, 4),))
        yield Sample(lambda x: x.transpose(1, 2).flatten(1), ((2, 3, 4),))
        yield Sample(lambda x: x.permute(0, 2, 3, 1).flatten(1), ((2, 4, 2, 3),))
        yield Sample(lambda x: x.view(x.shape[0], 2, 3, 2, 2).transpose(1, 2).flatten(1, 2), ((2, 6, 2, 2),))
        yield Sample(lambda x: x.permute(0, 2, 3, 1), ((2, 4, 2, 3),))
        yield Sample(lambda x, y: torch.cat([x, y], 1), ((2, 4, 2, 2), (2, 3, 2, 2)))
        yield Sample(lambda x, y: torch.cat([x, y, x], -1), ((2, 3, 4), (2, 3, 2)))
        yield Sample(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), ((2, 6, 2, 2),))
        yield Sample(lambda x: x[:, 1:4], ((2, 6, 2, 2),))
        yield Sample(lambda x: x[:, :, 2], ((2, 3, 4),))
        yield Sample(lambda x: F.pixel_shuffle(x, 2), ((2, 8, 2, 2),))
        yield Sample(lambda x: F.pad(x, (1, 0, 2, 1), value=0.5), ((2, 3, 2, 2),))
        yield Sample(lambda x: F.pad(x, (1, 0, 2, 1), mode="replicate"), ((2, 3, 3, 2),))
        yield Sample(lambda x: F.pad(x, (1, 1, 0, 2), mode="reflect"), ((2, 3, 3, 2),))
        yield Sample(lambda x: x.roll(1, 1), ((2, 4, 3, 3),))
        yield Sample(lambda x: x.unsqueeze(1).expand(x.shape[0], 3, 4), ((2, 4),))
        yield Sample(lambda x: x.flip(1), ((2, 5, 2, 2),))
        yield Sample(_overwritten, ((2, 5, 3, 3), (2, 2, 3, 3)))


def _overwritten(x: Tensor, y: Tensor) -> Tensor:
    """A slice, then a selection of x is written to."""
    x = x.clone()
    x[:, 1:3] = y
    x[:, :, 0] = y[:, :1, 1]
    return x


def _sources(node: fx.Node, facts: Facts) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n in facts.unknown]


def _followed(sources: Sequence[Tensor], index: Tensor) -> Tensor:
    """Bits of the concatenated sources at `index`; False for padding."""
    bits = [bits.flatten() for bits in sources]
    return torch.cat([*bits, bits[0].new_zeros(1)])[index]  # -1, for padding, is the last


def _scatter(index: Tensor, size: int) -> Tensor:
    chosen = torch.zeros(size, dtype=torch.bool, device="cpu")
    chosen[index[index >= 0].cpu()] = True
    return chosen


def _new_sizes(node: fx.Node, layout: Layout) -> dict[str, Any]:
    name = cast(Any, node.target)._schema.arguments[1].name
    sizes = list(arg(node, name))
    new = [
        size if isinstance(size, fx.Node) or size == -1 or layout.full(node, dim) else layout.new_shape(node)[dim]
        for dim, size in enumerate(sizes)
    ]
    return {name: new} if new != sizes else {}


def _new_bounds(node: fx.Node, layout: Layout) -> dict[str, Any]:
    x = cast(fx.Node, node.args[0])
    dim = arg(node, "dim") % len(layout.kept[x])
    if layout.full(x, dim) or arg(node, "step") != 1:
        return {}
    start, end, _ = slice(arg(node, "start"), arg(node, "end")).indices(len(layout.kept[x][dim]))
    kept = layout.kept[x][dim]
    return {"start": int(kept[:start].sum()), "end": int(kept[:end].sum())}


def _new_position(node: fx.Node, layout: Layout) -> dict[str, Any]:
    x = cast(fx.Node, node.args[0])
    dim = arg(node, "dim") % len(layout.kept[x])
    index = arg(node, "index") % len(layout.kept[x][dim])
    return {} if layout.full(x, dim) else {"index": int(layout.kept[x][dim][:index].sum())}


def _non_empty(node: fx.Node, layout: Layout) -> dict[str, Any]:
    tensors = list(arg(node, "tensors"))
    left = [n for n in tensors if 0 not in layout.new_shape(n)] or tensors[:1]
    return {"tensors": left} if len(left) != len(tensors) else {}


def _new_padding(node: fx.Node, layout: Layout) -> dict[str, Any]:
    """Padding along a cut dimension shrinks to what is kept of it."""
    x, pads = cast(fx.Node, node.args[0]), list(cast("list[int]", node.args[1]))
    new = list(pads)
    for i in range(len(pads) // 2):
        dim = len(layout.kept[x]) - 1 - i
        kept = layout.kept[node][dim]
        if not kept.all() and min(pads[2 * i], pads[2 * i + 1]) >= 0:
            new[2 * i] = int(kept[: pads[2 * i]].sum())
            new[2 * i + 1] = int(kept[len(kept) - pads[2 * i + 1] :].sum())
    return {"pad": new} if new != pads else {}


SIZED = (*RESHAPES[:3], aten.expand.default, aten.repeat.default)
_REWRITE: dict[Any, Any] = {
    aten.view.default: _new_sizes,
    aten._unsafe_view.default: _new_sizes,
    aten.reshape.default: _new_sizes,
    aten.expand.default: _new_sizes,
    aten.slice.Tensor: _new_bounds,
    aten.slice_scatter.default: _new_bounds,
    aten.select.int: _new_position,
    aten.select_scatter.default: _new_position,
    aten.cat.default: _non_empty,
    aten.constant_pad_nd.default: _new_padding,
}
