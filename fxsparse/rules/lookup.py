"""Rows of a stored table, chosen by the input: y[..., d] = table[index[...], d]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.ir.bits import any_along, some
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import aten, operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.rules.rule import Rule, Sample


class Embedding(Rule):
    """A feature is known when all rows of the table agree on it. Features are cut, rows stay."""

    ops = (aten.embedding.default,)

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        table, _ = _operands(node)
        if some(facts.unknown[table]):
            return super().unknown(node, facts)
        rows = facts.value[table]
        return any_along(rows != rows[:1], 0).expand_as(facts.value[node]).clone()

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        table, index = _operands(node)
        features = any_along(demanded, [*range(demanded.dim() - 1)])
        return {table: features.expand_as(facts.unknown[table]), index: any_along(demanded, [-1])}

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        table, index = _operands(node)
        cause = f"coupled by {operator_name(node)} ({owner(node)})"
        layout.pin(table, "", [0])
        layout.tie(table, 1, node, -1, cause)
        for dim in range(len(layout.kept[index])):
            layout.tie(index, dim, node, dim, cause)

    def samples(self) -> Iterable[Sample]:
        table = torch.tensor([[1.0, 0.0, 2.0, -3.0], [4.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
        yield Sample(lambda x: F.embedding((x > 0).long(), table.to(x)), ((2, 3),))
        yield Sample(lambda x: F.embedding((x > 0).long(), table.to(x)), ((2, 3, 2),))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    return cast("tuple[fx.Node, fx.Node]", node.args[:2])
