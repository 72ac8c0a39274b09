"""Our own row groups: rows assigned to groups of equal size, columns to each group, for the largest kept sum of w^2.

`fxsparse.coarsen.swaps` says how rows are put together, `fxsparse.coarsen.cost` how columns are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.coarsen.cost import best_columns
from fxsparse.coarsen.each_layer import each_layer, where_columns_are_shared
from fxsparse.coarsen.given import Density, budget_of, check_density, check_rows, energy_of
from fxsparse.coarsen.report import Coarsened, RowGroup
from fxsparse.coarsen.swaps import by_energy, group_energy, improve
from fxsparse.ir.masks import Masks


def partition(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    group_rows: int = 32,
    density: Density = None,
    sweeps: int = 24,
) -> Coarsened:
    """Row groups of `group_rows` rows that each keep a list of columns of their own, chosen for the largest sum of w^2.

    weights     parameter name -> float [O, ...], viewed as [O, n]: a column is one (input channel, kh, kw)
    masks       parameter name -> the weight's shape, True = kept; only what they keep counts as energy
    group_rows  rows per group; the last group of a layer is smaller when O is not a multiple
    density     of the result, for all layers or by name; a layer without one keeps as many weights as its mask, at most
    sweeps      rounds of swaps; 0 groups rows by their energy alone

    Every row group of the result is dense inside: rows of a group have equal mask rows. A group can end up without
    columns; its rows are then dropped whole. Depthwise convolutions and masks of fewer than two dimensions are passed
    on, and the report says so. This changes the function: fine-tune afterwards. The result is the same every time.
    Raises InputError on options outside their range and weights that are NaN or infinite, MaskError on a mask that fits
    no weight.
    """
    check_rows("group_rows", group_rows)
    given = Masks(masks)
    check_density(density, given)

    def rule(name: str, weight: Tensor, mask: Tensor) -> tuple[tuple[RowGroup, ...], str]:
        return _groups(weight, mask, group_rows, budget_of(name, mask, density), sweeps), ""

    return each_layer(weights, given, where_columns_are_shared(rule))


def _groups(weight: Tensor, mask: Tensor, group_rows: int, budget: int, sweeps: int) -> tuple[RowGroup, ...]:
    energy = energy_of(weight, mask)
    sizes = group_sizes(len(energy), group_rows)
    labels = improve(energy, by_energy(energy, sizes), sizes, budget, sweeps)
    return with_best_columns(energy, labels, sizes, budget)


def group_sizes(rows: int, group_rows: int) -> Tensor:
    """`group_rows` for every group but the last, which has the rest. int64 [ceil(rows / group_rows)]"""
    sizes = torch.full((-(-rows // group_rows),), group_rows)
    sizes[-1] = rows - group_rows * (len(sizes) - 1)
    return sizes


def with_best_columns(energy: Tensor, labels: Tensor, sizes: Tensor, budget: int) -> tuple[RowGroup, ...]:
    """The row groups of these labels with the columns that keep most within `budget` weights."""
    taken = best_columns(group_energy(energy, labels, len(sizes)), sizes, budget)
    return tuple(
        RowGroup((labels == g).nonzero().flatten(), columns.nonzero().flatten()) for g, columns in enumerate(taken)
    )
