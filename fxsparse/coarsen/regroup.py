"""Regroup: rows that keep similar columns become groups, each with the columns most of its rows keep.

Source: Chen et al., Coarsening the Granularity (ICML 2022), Algorithm 3, after Rumi et al. (PACT 2020). No values of
the algorithm's thresholds were ever published and the released code does not use them, so two rules are offered:
`released`, what that code does, and `cost`, which weighs what a group keeps against what it costs to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxsparse.coarsen.cluster import check_partitioner, clusters
from fxsparse.coarsen.cost import Cost, best_columns
from fxsparse.coarsen.each_layer import each_layer, where_columns_are_shared
from fxsparse.coarsen.given import check_rows, energy_of
from fxsparse.coarsen.partition import group_sizes
from fxsparse.coarsen.released import released_blocks
from fxsparse.coarsen.report import Coarsened, RowGroup
from fxsparse.coarsen.swaps import group_energy
from fxsparse.errors import InputError, near
from fxsparse.ir.masks import Masks

RULES = ("released", "cost")
_Cluster = Callable[[Tensor, Tensor, int], list[Tensor]]


def regroup(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    rule: str = "cost",
    parts: int = 8,
    row_tile: int = 32,
    min_rows: int = 16,
    column_ratio: float = 1.5,
    partitioner: str = "metis",
    cost: Cost | None = None,
) -> Coarsened:
    """Cluster the rows of every masked weight and keep, per group, one list of columns.

    weights       parameter name -> float [O, ...], viewed as [O, n]
    masks         parameter name -> the weight's shape, True = kept
    rule          "released": `parts` clusters; of each, the columns most of its rows keep, as many as the released code
                  takes (see `released_blocks`); it looks at masks alone and the density usually grows.
                  "cost": groups of `min_rows`, `row_tile` or twice as many rows, whichever keeps the most w^2 at the
                  same cost; that of the mask's own number of weights in groups of `row_tile` rows
    parts         clusters, for "released"; with "cost" there are as many as groups
    row_tile      rows that are computed together
    min_rows      "released" takes clusters of more rows than this; "cost" makes no smaller groups but the last
    column_ratio  the released code's t1; "released" only
    partitioner   "metis" (the default; needs pymetis) on the graph of similar rows, "mtkahypar" (needs mtkahypar) on
                  the hypergraph of columns, as the paper's hMETIS, "hierarchical" complete linkage, "saliency" our own,
                  which looks at the weights; the last two need no package
    cost          what a group costs, for "cost"; default `Cost()`

    The report's `fallback` says which layers and rows the rule dropped or passed on, and why. This changes the
    function: fine-tune afterwards. Raises InputError on options outside their range, weights that are NaN or infinite
    and a partitioner whose package is missing, MaskError on a mask that fits no weight.
    """
    _check_options(rule, parts, row_tile, min_rows, column_ratio, partitioner)

    def cluster(mask: Tensor, energy: Tensor, count: int) -> list[Tensor]:
        return clusters(mask, energy, count, partitioner)

    def made(name: str, weight: Tensor, mask: Tensor) -> tuple[tuple[RowGroup, ...] | None, str]:
        bits, energy = mask.flatten(1).cpu(), energy_of(weight, mask)
        if not bool(bits.any()):
            return (), ""
        if rule == "cost":
            return _by_cost(bits, energy, cluster, sorted({min_rows, row_tile, 2 * row_tile}), row_tile, cost or Cost())
        alive = bits.any(1).nonzero().flatten()
        found = [alive[rows] for rows in cluster(bits[alive], energy[alive], parts)]
        return released_blocks(bits, found, row_tile, min_rows, column_ratio)

    return each_layer(weights, Masks(masks), where_columns_are_shared(made))


def _by_cost(
    mask: Tensor, energy: Tensor, cluster: _Cluster, tried: list[int], row_tile: int, cost: Cost
) -> tuple[tuple[RowGroup, ...], str]:
    """The groups that keep the most energy at the cost of the mask's own number of weights."""
    alive = mask.any(1).nonzero().flatten()
    tiles = group_sizes(len(alive), row_tile)
    budget = int(mask.sum()) + cost.overhead_columns * int(tiles.sum())
    best: tuple[RowGroup, ...] = ()
    kept = -1.0
    for rows in (r for r in tried if r == tried[0] or r < 2 * len(alive)):
        sizes = group_sizes(len(alive), rows)
        labels = tiled(cluster(mask[alive], energy[alive], len(sizes)), energy[alive], sizes)
        sums = group_energy(energy[alive], labels, len(sizes))
        taken = best_columns(sums, sizes, budget, cost)
        now = float((sums * taken).sum(dtype=torch.float64))
        if now >= kept:  # of equal results the one with fewer groups
            groups = [(alive[labels == g], columns.nonzero().flatten()) for g, columns in enumerate(taken)]
            best, kept = tuple(RowGroup(r, c) for r, c in groups), now
    return best, ""


def tiled(found: list[Tensor], energy: Tensor, sizes: Tensor) -> Tensor:
    """Labels int64 [O] of groups of exactly these sizes, close to the clusters given.

    found  clusters, the largest first. Their rows of most energy fill whole groups; what is left of the larger ones
           opens the other groups, and what is left of the smaller ones fills these up
    sizes  int64 [G], all equal but the last
    """
    power, tile = energy.sum(1, dtype=torch.float64), int(sizes[0])
    ranked = [rows[power[rows].argsort(descending=True, stable=True)] for rows in found]
    whole = [part for rows in ranked for part in rows.split(tile) if len(part) == tile]
    rests = sorted((rows[len(rows) // tile * tile :] for rows in ranked), key=lambda rows: -len(rows))
    opened = rests[: len(sizes) - len(whole)]
    loose = torch.cat([*rests[len(opened) :], torch.empty(0, dtype=torch.int64)])
    groups = []
    # The last group comes first: it can be smaller than what opens it.
    for rows, size in reversed(list(zip(opened, sizes[len(whole) :].tolist(), strict=True))):
        rows, loose = rows[:size], torch.cat([loose, rows[size:]])
        groups.append(torch.cat([rows, loose[: size - len(rows)]]))
        loose = loose[size - len(rows) :]
    labels = torch.empty(len(energy), dtype=torch.int64)
    for g, rows in enumerate([*whole, *reversed(groups)]):
        labels[rows] = g
    return labels


def _check_options(rule: str, parts: int, row_tile: int, min_rows: int, ratio: float, partitioner: str) -> None:
    if rule not in RULES:
        raise InputError(
            f"rule {rule!r}",
            expected=f"one of {', '.join(map(repr, RULES))}",
            got=repr(rule),
            do=near(rule, RULES) or "'cost' weighs what a group keeps against its cost.",
        )
    if parts < 1:
        raise InputError(
            f"parts {parts!r}", expected="a positive number of clusters", got=repr(parts), do="The released code has 8."
        )
    check_rows("row_tile", row_tile)
    check_rows("min_rows", min_rows)
    if not ratio > 0:
        raise InputError(
            f"column_ratio {ratio!r}", expected="a positive ratio", got=repr(ratio), do="The released code has 1.5."
        )
    check_partitioner(partitioner)
