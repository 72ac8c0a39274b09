"""Normalization. Inference batch norm, per channel: y = gamma (x - mean) / sqrt(var + eps) + beta; known for gamma = 0.

Layer norm and softmax mix a whole dimension: one unknown element makes all of it unknown, and all of it is needed. The
dimension keeps its length. Group norm and instance norm do so within groups of channels, which go as wholes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.ir.bits import some, whole
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, aten, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.rules.rule import Rule, Sample, tie_leading


class BatchNorm(Rule):
    """Inference batch norm; `canonicalize` writes every variant as this one operator."""

    ops = (aten.batch_norm.default,)

    def _scale(self, node: fx.Node, facts: Facts) -> Tensor:
        gamma, mean = arg(node, "weight"), arg(node, "running_mean")
        scale = facts.nonzero(gamma) if gamma is not None else torch.ones_like(facts.value[mean], dtype=torch.bool)
        x = facts.unknown[node.args[0]]  # type: ignore[index]
        return scale.view([-1 if d == 1 else 1 for d in range(x.dim())])

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        if _computed_weights(node, facts):
            return super().unknown(node, facts)
        return facts.unknown[node.args[0]] & self._scale(node, facts)  # type: ignore[index]

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        weights = {n: torch.ones_like(facts.unknown[n]) for n in node.all_input_nodes}
        return {**weights, node.args[0]: demanded & self._scale(node, facts)}  # type: ignore[dict-item]

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        x = node.args[0]
        tie_leading(node, x, layout, range(len(layout.kept[node])))  # type: ignore[arg-type]
        for n in node.all_input_nodes:
            if n is not x:
                layout.tie(node, 1, n, 0, "")

    def samples(self) -> Iterable[Sample]:
        gamma = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
        mean, var = gamma + 0.3, gamma.abs() + 0.5
        for shape in ((2, 4, 3, 3), (2, 4)):
            yield Sample(lambda x: F.batch_norm(x, mean.to(x), var.to(x), gamma.to(x), mean.to(x)), (shape,))


class Mixing(Rule):
    """Operators that mix one or more whole dimensions and keep the shape."""

    ops: tuple[Any, ...] = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default)

    def mixed(self, node: fx.Node, rank: int) -> list[int]:
        return [arg(node, "dim") % rank]

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        if _computed_weights(node, facts):
            return super().unknown(node, facts)
        x = facts.unknown[node.args[0]]  # type: ignore[index]
        return whole(x, self.mixed(node, x.dim()))

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        weights = {n: torch.ones_like(facts.unknown[n]) for n in node.all_input_nodes}
        mixed = whole(demanded, self.mixed(node, demanded.dim()))
        return {**weights, node.args[0]: mixed}  # type: ignore[dict-item]

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        x: Any = node.args[0]
        rank = len(layout.kept[node])
        mixed = self.mixed(node, rank)
        cause = f"{operator_name(node)} ({owner(node)}) needs its whole dimension"
        for n in (x, node):
            layout.pin(n, cause, mixed)
        for n in node.all_input_nodes:
            if n is not x:
                layout.pin(n, cause)
        tie_leading(node, x, layout, [d for d in range(rank) if d not in mixed])

    def samples(self) -> Iterable[Sample]:
        yield Sample(lambda x: torch.softmax(x, -1), ((2, 3, 5),))
        yield Sample(lambda x: torch.cumsum(x, 1), ((2, 3, 5),))


class LayerNorm(Mixing):
    """layer_norm and rms_norm over the last dimensions; known for gamma = 0, like batch norm."""

    ops = (aten.layer_norm.default, aten.rms_norm.default)

    def mixed(self, node: fx.Node, rank: int) -> list[int]:
        return list(range(rank - len(arg(node, "normalized_shape")), rank))

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        return super().unknown(node, facts) & self._scale(node, facts)

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        return super().demand(node, facts, demanded & self._scale(node, facts))

    def _scale(self, node: fx.Node, facts: Facts) -> Tensor:
        """Where the output can depend on the input: all of it when gamma, or beta, is computed from the input."""
        gamma = arg(node, "weight")
        everywhere = torch.ones_like(facts.value[node], dtype=torch.bool)
        return everywhere if gamma is None or _computed_weights(node, facts) else everywhere & facts.nonzero(gamma)

    def samples(self) -> Iterable[Sample]:
        gamma = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0], dtype=torch.float64)
        yield Sample(lambda x: F.layer_norm(x, (5,), gamma.to(x), gamma.to(x)), ((2, 3, 5),))
        yield Sample(lambda x: F.rms_norm(x, (5,), gamma.to(x)), ((2, 3, 5),))


class GroupNorm(Rule):
    """group_norm: channels and positions of a group are mixed. A group stays whole or goes whole.

    What is known of a group is the same at all positions of an image of any size, and so are its mean and variance.
    """

    at_any_size = True
    ops: tuple[Any, ...] = (aten.group_norm.default,)

    def groups(self, node: fx.Node) -> int:
        """How many."""
        return arg(node, "num_groups")  # type: ignore[no-any-return]

    def mixed(self, node: fx.Node, rank: int) -> list[int]:
        return list(range(1, rank))

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        if _computed_weights(node, facts):
            return super().unknown(node, facts)
        return self._of_groups(node, facts.unknown[node.args[0]])  # type: ignore[index]

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        weights = {n: torch.ones_like(facts.unknown[n]) for n in node.all_input_nodes}
        return {**weights, node.args[0]: self._of_groups(node, demanded)}  # type: ignore[dict-item]

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        x: Any = node.args[0]
        rank = len(layout.kept[node])
        alive = layout.kept[node][1].view(self.groups(node), -1)
        for n in (x, node):
            layout.pin(n, "", range(2, rank))
            whole_groups = alive.any(1).repeat_interleave(alive.shape[1])
            layout.grow(n, 1, whole_groups, f"{operator_name(node)} ({owner(node)}): a group stays whole")
        tie_leading(node, x, layout, [0, 1])
        for n in node.all_input_nodes:
            if n is not x:
                layout.tie(node, 1, n, 0, "")

    def rewrite(self, node: fx.Node, facts: Facts, layout: Layout) -> dict[str, Any]:
        kept = int(layout.kept[node][1].view(self.groups(node), -1).any(1).sum())
        return {"num_groups": kept} if kept != self.groups(node) else {}

    def samples(self) -> Iterable[Sample]:
        gamma = torch.tensor([1.0, 0.0, -2.0, 0.5, 1.5, 0.0], dtype=torch.float64)
        yield Sample(lambda x: F.group_norm(x, 2), ((2, 4, 3, 3),))
        yield Sample(lambda x: F.group_norm(x, 3, gamma.to(x), gamma.to(x)), ((2, 6, 3, 2),))
        yield Sample(lambda x: F.group_norm(x, 6, gamma.to(x)), ((2, 6, 3, 2),))

    def _of_groups(self, node: fx.Node, bits: Tensor) -> Tensor:
        """Set in a whole group where one of it is."""
        parts = bits.unflatten(1, (self.groups(node), -1))
        return whole(parts, list(range(2, parts.dim()))).flatten(1, 2)


class InstanceNorm(GroupNorm):
    """instance_norm by the statistics of the input: a group for each channel."""

    ops = (aten.instance_norm.default,)

    def groups(self, node: fx.Node) -> int:
        return node.meta["val"].shape[1]  # type: ignore[no-any-return]

    def rewrite(self, node: fx.Node, facts: Facts, layout: Layout) -> dict[str, Any]:
        return {}

    def samples(self) -> Iterable[Sample]:
        gamma = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
        yield Sample(F.instance_norm, ((2, 4, 3, 3),))
        yield Sample(lambda x: F.instance_norm(x, weight=gamma.to(x), bias=gamma.to(x)), ((2, 4, 3, 2),))


def _computed_weights(node: fx.Node, facts: Facts) -> bool:
    """Whether a scale, shift or statistic depends on the input."""
    return any(some(facts.unknown[n]) for n in node.all_input_nodes if n is not node.args[0])
