"""Refill: an unstructured mask becomes whole rows (output channels), with the same budget per layer.

per layer, mask m and trained weight w, both [O, n] with one row per output channel:
    s_i = sum_j |m_ij w_ij|                      # importance of row i
    k   = ceil(density(m) * O)                   # the layer's own budget, at least 1
    m'  = 1 on the k rows of largest s, all n entries; 0 on the others
Source: Chen et al., Coarsening the Granularity (ICML 2022), Algorithm 2; `extra` is its Refill+.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from fxsparse.coarsen.each_layer import each_layer
from fxsparse.coarsen.report import Coarsened, RowGroup
from fxsparse.errors import InputError, near
from fxsparse.ir.masks import Masks

CRITERIA = ("l1", "count")


def refill(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    criterion: str = "l1",
    extra: float = 0.0,
    round_to: int = 1,
) -> Coarsened:
    """Keep the most important rows of every masked weight, whole, and drop the other rows.

    weights    parameter name -> float [O, ...], one row per output channel; trained, with or without the mask applied
    masks      parameter name -> the weight's shape, True = kept; weights without a mask stay dense
    criterion  importance of a row: "l1", the sum of |w| its mask keeps, or "count", how many its mask keeps
    extra      share of the dropped rows to bring back (Refill+; the paper's pair of densities implies 0.2)
    round_to   round the number of rows up to a multiple of this, at most O

    Of equally important rows the lower one is kept. Masks with fewer than two dimensions (biases, norms) are passed
    on as they are. Every row of a weight counts as a feature: leave out a classification head, as `prunable` does.
    This changes the function: fine-tune afterwards, with the refilled weights as `imp`'s `rewind_state` has them.
    Raises InputError on an unknown criterion, an `extra` or `round_to` outside its range and on weights that are NaN
    or infinite; MaskError on a mask that fits no weight.
    """
    _check_options(criterion, extra, round_to)

    def rule(name: str, weight: Tensor, mask: Tensor) -> tuple[tuple[RowGroup, ...], str]:
        rows = _best_rows(weight, mask, criterion, _row_budget(mask, extra, round_to))
        return (RowGroup(rows, torch.arange(mask[0].numel())),), ""

    return each_layer(weights, Masks(masks), rule)


def _row_budget(mask: Tensor, extra: float, round_to: int) -> int:
    """How many of the rows to keep, at least 1. In integers: 0.3 * 10 in floats is above 3."""
    rows = mask.shape[0]
    keep = max(1, -(-int(mask.sum()) * rows // mask.numel()))
    keep += math.floor((rows - keep) * Fraction(str(extra)))
    return min(rows, -(-keep // round_to) * round_to)


def _best_rows(weight: Tensor, mask: Tensor, criterion: str, keep: int) -> Tensor:
    """The `keep` most important rows, int64, ascending, on the CPU."""
    values = mask if criterion == "count" else weight.abs() * mask
    # float64, so that the order does not hang on the order of summation
    importance = values.flatten(1).sum(1, dtype=torch.float64)
    return importance.argsort(descending=True, stable=True)[:keep].sort().values.cpu()


def _check_options(criterion: str, extra: float, round_to: int) -> None:
    if criterion not in CRITERIA:
        raise InputError(
            f"criterion {criterion!r}",
            expected=f"one of {', '.join(repr(known) for known in CRITERIA)}",
            got=repr(criterion),
            do=near(criterion, CRITERIA) or "'l1' is the paper's default and was the best in its comparison.",
        )
    if not 0 <= extra <= 1:
        raise InputError(
            f"extra {extra!r}",
            expected="a share of the dropped rows to bring back, 0 <= extra <= 1",
            got=repr(extra),
            do="0 is Refill; 0.2 is about the paper's Refill+.",
        )
    if round_to < 1:
        raise InputError(
            f"round_to {round_to!r}",
            expected="a positive number of rows",
            got=repr(round_to),
            do="1 does not round; 8, 16 or 32 suit most hardware.",
        )
