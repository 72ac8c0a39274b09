"""Shuffled blocks as in DSB: rows put together by the columns they keep, columns of each row group cut into blocks.

    similarity of rows  |A and B| / sqrt(|A| |B|), clustered with complete linkage into O // B clusters
    row groups          rows by cluster, the largest first, cut into groups of B rows
    in each group       v_j = sqrt(sum over its rows of w_ij^2); columns by falling v_j, cut into blocks of B columns
    kept                the blocks of largest sum of v_j, over all groups, until density O n weights are reached
Source: Dynamic Shuffled-Block training (NeurIPS 2022), its released extract_blocks; there a layer whose O or n B does
not divide is skipped, here its last group and blocks are smaller.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.coarsen.cluster import complete_linkage, cosine
from fxsparse.coarsen.each_layer import each_layer, where_columns_are_shared
from fxsparse.coarsen.given import Density, budget_of, check_density, check_rows
from fxsparse.coarsen.partition import group_sizes
from fxsparse.coarsen.report import Coarsened, RowGroup
from fxsparse.coarsen.swaps import group_energy
from fxsparse.errors import InputError
from fxsparse.ir.masks import Masks


def shuffled_block(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    block: int = 16,
    q: float | None = None,
    density: Density = None,
) -> Coarsened:
    """Keep the blocks of `block` rows and columns with the largest weights, after putting similar rows together.

    weights  parameter name -> float [O, ...], viewed as [O, n]
    masks    parameter name -> the weight's shape, True = kept
    block    rows and columns of a block; the last of each is smaller when it does not divide
    q        cluster only rows whose similarity to another row is above q, 0 to 1; None, as released: all of them
    density  of the result, for all layers or by name; default that of each mask. It is exceeded by less than one block

    A kept weight that is exactly 0, as one just grown is, counts as the mean |w| of its layer. Depthwise convolutions
    and masks of fewer than two dimensions are passed on, and the report says so. This changes the function: fine-tune
    afterwards. Raises InputError on options outside their range and weights that are NaN or infinite, MaskError on a
    mask that fits no weight.
    """
    check_rows("block", block)
    given = Masks(masks)
    check_density(density, given)
    _check_q(q)

    def rule(name: str, weight: Tensor, mask: Tensor) -> tuple[tuple[RowGroup, ...], str]:
        return _groups(weight, mask, block, q, budget_of(name, mask, density)), ""

    return each_layer(weights, given, where_columns_are_shared(rule))


def _groups(weight: Tensor, mask: Tensor, block: int, q: float | None, budget: int) -> tuple[RowGroup, ...]:
    magnitude, kept = magnitudes(weight, mask), mask.flatten(1).cpu()
    sizes = group_sizes(len(kept), block)
    labels = torch.empty(len(kept), dtype=torch.int64)
    labels[_row_order(kept, block, q)] = torch.repeat_interleave(sizes)
    norms = group_energy(magnitude.square(), labels, len(sizes)).sqrt()
    taken = _best_blocks(norms, sizes, block, budget)
    return tuple(RowGroup((labels == g).nonzero().flatten(), row.nonzero().flatten()) for g, row in enumerate(taken))


def magnitudes(weight: Tensor, mask: Tensor) -> Tensor:
    """|w| where kept, float32 [O, n], scaled to a mean of 1; the mean where w is exactly 0 although it is kept."""
    size = torch.where(mask, weight, 0).flatten(1).cpu().double().abs()
    grown = (size == 0) & mask.flatten(1).cpu()
    nonzero = int((size > 0).sum())
    mean = float(size.sum()) / nonzero if nonzero else 1.0
    return (size / mean).masked_fill(grown, 1.0).float()


def _row_order(mask: Tensor, block: int, q: float | None) -> Tensor:
    """All rows, clusters one after the other, the largest first; rows that are not clustered come last."""
    similarity = cosine(mask)
    like = torch.ones(len(mask), dtype=torch.bool) if q is None else similarity.clone().fill_diagonal_(0).amax(1) > q
    rows = like.nonzero().flatten()
    labels = torch.zeros(len(rows), dtype=torch.int64)
    if len(rows) > 1:
        labels = complete_linkage(1 - similarity[rows][:, rows], max(1, len(rows) // block))
    sizes = labels.bincount() if len(rows) else labels
    order = torch.argsort(-sizes[labels] * (len(mask) + 1) + labels, stable=True)
    return torch.cat([rows[order], (~like).nonzero().flatten()])


def _best_blocks(norms: Tensor, sizes: Tensor, block: int, budget: int) -> Tensor:
    """The columns of every row group that are in one of the best blocks. Bool [G, n]; norms float [G, n]."""
    groups, columns = norms.shape
    value, order = norms.double().sort(dim=1, descending=True, stable=True)
    blocks = -(-columns // block)
    score = torch.nn.functional.pad(value, (0, blocks * block - columns)).view(groups, blocks, block).sum(2).flatten()
    widths = torch.full((blocks,), block)
    widths[-1] = columns - block * (blocks - 1)
    ranked = score.argsort(descending=True, stable=True)[: int((score > 0).sum())]
    before = (sizes[:, None] * widths).flatten()[ranked].cumsum(0).roll(1)
    before[:1] = 0
    chosen = torch.zeros(groups * blocks, dtype=torch.bool)
    chosen[ranked[before < budget]] = True
    by_rank = chosen.view(groups, blocks).repeat_interleave(block, dim=1)[:, :columns]
    return torch.zeros_like(by_rank).scatter_(1, order, by_rank)


def _check_q(q: float | None) -> None:
    if q is not None and not 0 <= q <= 1:
        raise InputError(
            f"q {q!r}",
            expected="a similarity of two rows, 0 <= q <= 1, or None",
            got=repr(q),
            do="None clusters every row, as the released code does.",
        )
