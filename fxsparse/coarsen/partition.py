"""Our own row groups: rows assigned to groups of equal size, columns to each group, for the largest kept sum of w^2.

`fxsparse.coarsen.swaps` says how rows are put together, `fxsparse.coarsen.cost` how columns are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.coarsen.cost import best_columns
from fxsparse.coarsen.given import check_rows, energy_of, layers_of, why_not
from fxsparse.coarsen.report import Coarsened, RowGroup, describe, union
from fxsparse.coarsen.swaps import by_energy, group_energy, improve
from fxsparse.errors import InputError, MaskError, near
from fxsparse.ir.masks import Masks

Density = float | Mapping[str, float] | None


def partition(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    group_rows: int = 32,
    density: Density = None,
    sweeps: int = 40,
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
    _check_density(density, given)
    found: dict[str, Tensor] = dict(given)
    layers, groups = [], {}
    for name, weight, mask in layers_of(weights, given):
        fallback = why_not(mask)
        groups[name] = () if fallback else _groups(weight, mask, group_rows, _budget(name, mask, density), sweeps)
        found[name] = mask if fallback else union(groups[name], mask)
        layers.append(describe(name, weight, mask, found[name], groups[name], fallback))
    return Coarsened(Masks(found), tuple(layers), groups)


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


def _budget(name: str, mask: Tensor, density: Density) -> int:
    """Weights to keep, rounded down so that the density is never exceeded."""
    own = density.get(name) if isinstance(density, Mapping) else density
    return int(mask.sum()) if own is None else int(own * mask.numel() + 1e-6)


def _check_density(density: Density, masks: Masks) -> None:
    by_name = density if isinstance(density, Mapping) else {} if density is None else {"density": density}
    for name, value in by_name.items():
        if isinstance(density, Mapping) and name not in masks:
            raise MaskError(
                f"density of {name!r}",
                expected="the name of one of the masks",
                got=f"a name that is not among the {len(masks)} masks",
                do=near(name, masks) or "Leave it out: a layer without a density keeps that of its mask.",
            )
        if not 0 <= value <= 1:
            raise InputError(
                f"density {value!r}",
                expected="a fraction of weights to keep, 0 <= density <= 1",
                got=repr(value),
                do="density = 1 - sparsity; leave it out to keep as many weights as the mask does.",
            )
