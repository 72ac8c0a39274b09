"""Attention, softmax(q k^T * scale + mask) v, for each head: y[h, l, e] = sum over s of p[h, l, s] v[h, s, e].

A feature of v that is 0 at all positions is 0 in y; without a mask the weights p sum to 1, so a constant stays one. A
head of which nothing is demanded needs no q, k and v: heads go whole. The size of a head is cut where q, k and v are
cut alike (kernels are fast for equal sizes); what its default scale was is then written down. It holds for any length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.ir.bits import any_along
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, aten, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.rules.rule import Rule, Sample, reduce_to

_NAMES = ("query", "key", "value")


class Attention(Rule):
    """scaled_dot_product_attention: q [..., L, E], k [..., S, E], v [..., S, V]; fewer heads of k and v allowed."""

    ops = (aten.scaled_dot_product_attention.default,)
    at_any_size = True

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        q, k, v = self._operands(node)
        if not _aligned(facts, q, k, v):
            return super().unknown(node, facts)
        value, unknown = facts.value[v], facts.unknown[v]
        constant = value == value.narrow(-2, 0, 1) if arg(node, "attn_mask") is None else value == 0
        varies = any_along(unknown | ~constant, [-2], keepdim=True)
        return _of_heads(varies, facts.value[node]).expand_as(facts.value[node]).clone()

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        q, k, v = self._operands(node)
        every = super().demand(node, facts, demanded)
        if not _aligned(facts, q, k, v) or len({q, k, v}) < len(_NAMES):
            return every
        read = any_along(demanded, [-1], keepdim=True)
        alive = {n: any_along(facts.nonzero(n), [-2], keepdim=True) for n in (q, k)}  # what meets 0 is not needed
        bits = {
            q: read & _of_heads(alive[k], demanded),
            k: any_along(read, [-2], keepdim=True) & alive[q],
            v: any_along(demanded, [-2], keepdim=True),
        }
        found = {n: _fewer_heads(b, facts.unknown[n]).expand_as(facts.unknown[n]) for n, b in bits.items()}
        if isinstance(mask := arg(node, "attn_mask"), fx.Node):
            scores = read.expand(*demanded.shape[:-1], facts.value[k].shape[-2])
            found[mask] = reduce_to(scores, facts.unknown[mask].shape)
        return {**every, **found}

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        q, k, v = self._operands(node)
        if not _aligned(facts, q, k, v):
            super().couple(node, facts, layout)
            return
        cause = f"coupled by {operator_name(node)} ({owner(node)})"
        for n in (q, k, v, node):
            layout.pin(n, cause, [-2])
        for dim in range(len(layout.kept[node]) - 2):
            self._couple_leading(node, dim, layout, cause)
        layout.tie(q, -1, k, -1, cause)
        layout.tie(v, -1, node, -1, cause)
        if layout.shape(q)[-1] == layout.shape(v)[-1]:
            layout.tie(q, -1, v, -1, f"{cause}: heads of q, k and v stay of one size")
        self._couple_mask(node, layout, cause)

    def _couple_leading(self, node: fx.Node, dim: int, layout: Layout, cause: str) -> None:
        """Heads, and dimensions before them. Where queries share a head of k and v, it goes with all of them."""
        q, k, v = self._operands(node)
        layout.tie(q, dim, node, dim, cause)
        layout.tie(k, dim, v, dim, cause)
        if layout.shape(k)[dim] == layout.shape(q)[dim]:
            layout.tie(q, dim, k, dim, cause)
        elif layout.shape(k)[dim] == 1:
            layout.pin(k, cause, [dim])
        else:
            alive = layout.kept[q][dim].view(layout.shape(k)[dim], -1).any(1) | layout.kept[k][dim]
            times = layout.shape(q)[dim] // layout.shape(k)[dim]
            layout.grow(k, dim, alive, cause)
            if int(alive.sum()) > 1:  # of one that all share, any number can
                layout.grow(q, dim, alive.repeat_interleave(times), f"{cause}: queries that share a head stay together")

    def _couple_mask(self, node: fx.Node, layout: Layout, cause: str) -> None:
        mask = arg(node, "attn_mask")
        if not isinstance(mask, fx.Node):
            return
        before = len(layout.kept[node]) - len(layout.kept[mask])
        for dim, size in enumerate(layout.shape(mask)):
            if dim + before < len(layout.kept[node]) - 2 and size == layout.shape(node)[dim + before]:
                layout.tie(mask, dim, node, dim + before, cause)
            else:
                layout.pin(mask, cause, [dim])

    def rewrite(self, node: fx.Node, facts: Facts, layout: Layout) -> dict[str, Any]:
        q = self._operands(node)[0]
        cut = layout.new_shape(q)[-1] != layout.shape(q)[-1]
        return {"scale": layout.shape(q)[-1] ** -0.5} if cut and arg(node, "scale") is None else {}

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        q, k, v = (arg(node, name) for name in _NAMES)
        return q, k, v

    def samples(self) -> Iterable[Sample]:
        yield Sample(F.scaled_dot_product_attention, ((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)))
        yield Sample(F.scaled_dot_product_attention, ((2, 4, 5), (2, 6, 5), (2, 6, 3)))
        yield Sample(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), ((2, 3, 4, 5),) * 3)
        yield Sample(
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m > 0),
            ((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5), (2, 3, 4, 6)),
        )
        yield Sample(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            ((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 5)),
        )
        yield Sample(lambda x: F.scaled_dot_product_attention(x, x, x), ((2, 3, 5),))
        yield Sample(  # keys that others read too
            lambda q, k, v: torch.cat([F.scaled_dot_product_attention(q, k, v), k], 1), ((2, 3, 4, 5),) * 3
        )


def _aligned(facts: Facts, q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    """The same leading dimensions, or those of k and v have fewer heads; nothing is broadcast."""
    shapes = [facts.value[n].shape for n in (q, k, v)]
    if not len(shapes[0]) == len(shapes[1]) == len(shapes[2]) or shapes[1][:-2] != shapes[2][:-2]:
        return False
    mine, theirs = shapes[0][:-2], shapes[1][:-2]
    return mine == theirs or (len(mine) > 1 and mine[:-1] == theirs[:-1] and mine[-1] % theirs[-1] == 0)


def _of_heads(bits: Tensor, like: Tensor) -> Tensor:
    """Bits of k's heads as bits of q's: head i of q reads head i // (q's / k's)."""
    times = like.shape[-3] // bits.shape[-3] if like.dim() > 2 else 1
    return bits.repeat_interleave(times, -3) if times > 1 else bits


def _fewer_heads(bits: Tensor, like: Tensor) -> Tensor:
    """The reverse: one is set where a head of q that reads it is."""
    times = bits.shape[-3] // like.shape[-3] if like.dim() > 2 else 1
    return any_along(bits.unflatten(-3, (-1, times)), [-3], keepdim=False) if times > 1 else bits
