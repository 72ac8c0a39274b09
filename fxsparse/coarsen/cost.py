"""What a row group costs to compute, and which columns are worth that cost.

per layer, groups g of R_g rows, c_gj = sum over the rows of g of the energy (w^2) of column j:
    maximize    sum_g sum_{j in S_g} c_gj
    subject to  sum_{g: S_g not empty} cost(R_g, |S_g|) <= budget
With a price t per unit of cost, column j of g is worth taking when c_gj > t * (cost of one column), and the group worth
opening when what its columns are worth beyond that pays for its overhead. Lowering t only adds, so t is bisected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates per output position, or their equivalent in time, of a group with R rows and K columns.

        ceil(R / tile) * tile * (K + overhead_columns) * (narrow if ceil(R / tile) == 1 else 1), and 0 when K = 0

    tile              rows are computed in multiples of this
    overhead_columns  what starting a group costs, in columns
    narrow            how much slower a group of a single tile is
    The defaults were measured on one core with AVX-512: 32 and 64 rows alike, 16 rows about 3 % slower, a group's start
    as long as about 24 columns.
    """

    tile: int = 16
    overhead_columns: float = 24.0
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
    rate = energy.double() / each[:, None]
    order = rate.flatten().argsort(descending=True, stable=True)[: int((rate > 0).sum())]
    low, high = 0, len(order)  # the first `low` fit
    while low < high:
        middle = (low + high + 1) // 2
        taken = _taken(rate, order, middle, cost.overhead_columns)
        fits = cost.total(rows, taken.sum(1)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return _taken(rate, order, low, cost.overhead_columns)


def price(energy: Tensor, rows: Tensor, budget: float) -> float:
    """The lowest energy per kept weight that `best_columns` of kept weights would still take; 0 when all fit."""
    rate, order = (energy / rows[:, None]).flatten().sort(descending=True)
    spent = rows.repeat_interleave(energy.shape[1])[order].cumsum(0)
    last = int((spent <= budget).sum())
    return float(rate[last]) if last < len(rate) else 0.0


def _taken(rate: Tensor, order: Tensor, first: int, overhead: float) -> Tensor:
    """The `first` best columns, without those of groups that do not pay for their overhead."""
    taken = torch.zeros(rate.numel(), dtype=torch.bool)
    taken[order[:first]] = True
    taken = taken.view_as(rate)
    if first and overhead:
        lowest = rate.flatten()[order[first - 1]]
        worth = ((rate - lowest) * taken).sum(1)
        taken &= (worth >= lowest * overhead)[:, None]
    return taken
