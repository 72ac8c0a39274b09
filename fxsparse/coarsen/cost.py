"""What a row group costs to compute, and which columns are worth that cost.

per layer, groups g of R_g rows, c_gj = sum over the rows of g of the energy (w^2) of column j:
    maximize    sum_g sum_{j in S_g} c_gj
    subject to  sum_{g: S_g not empty} cost(R_g, |S_g|) <= budget
Columns are taken by falling c_gj per cost while they fit. Starting a group costs too: the group that keeps the least
for its cost is left out as long as the others, given its share, keep more than all did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.formats.grouping import START_COLUMNS, WIDTH


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates per output position, or their equivalent in time, of a group with R rows and K columns.

        ceil(R / tile) * tile * (K + overhead_columns) * (narrow if ceil(R / tile) == 1 else 1), and 0 when K = 0

    tile              rows are computed in multiples of this
    overhead_columns  what starting a group costs, in columns
    narrow            how much slower a group of a single tile is
    The defaults are those by which the CPU format finds its groups, and a guess for `narrow`: give your own machine's.
    """

    tile: int = WIDTH
    overhead_columns: float = START_COLUMNS
    narrow: float = 1.03

    def per_column(self, rows: Tensor) -> Tensor:
        """Cost of one column more, float64 [G]. rows int64 [G]"""
        tiles = -(-rows // self.tile)
        return (tiles * self.tile).double() * torch.where(tiles == 1, self.narrow, 1.0)

    def total(self, rows: Tensor, columns: Tensor) -> float:
        """Cost of all groups. rows, columns int64 [G]"""
        return float((self.per_column(rows) * (columns + self.overhead_columns) * (columns > 0)).sum())

    def __call__(self, rows: int, columns: int) -> float:
        return self.total(torch.tensor([rows]), torch.tensor([columns]))


WEIGHTS = Cost(tile=1, overhead_columns=0.0, narrow=1.0)  # kept weights, whatever they cost


def best_columns(energy: Tensor, rows: Tensor, budget: float, cost: Cost = WEIGHTS) -> Tensor:
    """The columns of every group that keep the most energy within the budget. Bool [G, n].

    energy  float [G, n], of each group's rows together
    rows    int64 [G], size of each group
    budget  in units of `cost`; columns without energy are never kept
    Of equal worth the lower group, then the lower column comes first.
    """
    each = cost.per_column(rows)
    rate = (energy.double() / each[:, None]).flatten()
    order = rate.argsort(descending=True, stable=True)[: int((rate > 0).sum())]
    group, column = order // energy.shape[1], order % energy.shape[1]

    def fill(opened: Tensor) -> tuple[Tensor, float]:
        left = budget - float(each[opened].sum()) * cost.overhead_columns
        spent = torch.where(opened[group], each[group], 0.0).cumsum(0)
        fits = opened[group] & (spent <= left)
        taken = torch.zeros(energy.shape, dtype=torch.bool)
        taken[group[fits], column[fits]] = True
        return taken, float(energy[taken].sum(dtype=torch.float64))

    if not cost.overhead_columns:
        return fill(torch.ones(len(rows), dtype=torch.bool))[0]
    return _without_the_poorest(energy, rows, cost, fill)


def _without_the_poorest(
    energy: Tensor, rows: Tensor, cost: Cost, fill: Callable[[Tensor], tuple[Tensor, float]]
) -> Tensor:
    """What `fill` takes of all groups, or of fewer when that keeps as much."""
    opened = torch.ones(len(rows), dtype=torch.bool)
    taken, kept = fill(opened)
    while int(opened.sum()) > 1:
        gain = (energy * taken).sum(1)
        fewer = opened & (gain > 0)
        if not bool(fewer.any()) or bool((fewer == opened).all()):  # too dear together, or all of them in use
            worth = gain / (cost.per_column(rows) * (taken.sum(1) + cost.overhead_columns)) if kept else energy.amax(1)
            fewer = opened.clone()
            fewer[worth.masked_fill(~opened, torch.inf).argmin()] = False
        now, more = fill(fewer)
        if more < kept:
            break
        opened, taken, kept = fewer, now, more
    return taken


def price(energy: Tensor, rows: Tensor, budget: float) -> float:
    """The lowest energy per kept weight that `best_columns` of kept weights would still take; 0 when all fit."""
    rate, order = (energy / rows[:, None]).flatten().sort(descending=True)
    spent = rows.repeat_interleave(energy.shape[1])[order].cumsum(0)
    last = int((spent <= math.floor(budget)).sum())  # in integers: a float32 counts to 2^24
    return float(rate[last]) if last < len(rate) else 0.0
