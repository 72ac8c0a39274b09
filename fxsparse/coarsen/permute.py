"""The order of rows and columns in which the blocks of a mask show: for pictures, and for the eye.

rows     group by group, the group with the most columns first; rows without weights last
columns  by use: those that the most rows keep first; of equal use, those of the same groups beside each other
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.coarsen.report import RowGroup


def permutation(groups: Sequence[RowGroup], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Orders of rows, int64 [rows], and columns, int64 [columns]: every index once, new position -> old index."""
    ranked = sorted(groups, key=lambda group: -len(group.columns))
    used = [group.rows for group in ranked if len(group.columns)]
    row_order = _and_the_others(torch.cat([torch.empty(0, dtype=torch.int64), *used]), rows)
    use = torch.zeros(columns, dtype=torch.int64)
    order = torch.arange(columns)
    for group in reversed(ranked):  # stable sorts, the most important last
        kept = torch.zeros(columns, dtype=torch.bool)
        kept[group.columns] = True
        use += kept * len(group.rows)
        order = order[kept[order].to(torch.uint8).argsort(descending=True, stable=True)]
    return row_order, order[use[order].argsort(descending=True, stable=True)]


def permuted(mask: Tensor, groups: Sequence[RowGroup]) -> Tensor:
    """The mask [O, ...] as [O, n] with its rows and columns in the order of `permutation`."""
    flat = mask.flatten(1).cpu()
    rows, columns = permutation(groups, *flat.shape)
    return flat[rows][:, columns]


def _and_the_others(first: Tensor, count: int) -> Tensor:
    """`first`, then the indices below `count` that are not in it."""
    left = torch.ones(count, dtype=torch.bool)
    left[first] = False
    return torch.cat([first, left.nonzero().flatten()])
