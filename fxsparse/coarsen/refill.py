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
from dataclasses import dataclass
from fractions import Fraction

import torch
from tabulate import tabulate
from torch import Tensor

from fxsparse.errors import InputError, MaskError, near
from fxsparse.ir.masks import Masks

CRITERIA = ("l1", "count")


@dataclass(frozen=True)
class Layer:
    """What Refill did to one weight.

    rows, rows_kept  output channels, and how many of them are kept
    density_*        fraction of the weights kept
    l1_kept          share of the sum of |w| over the weights the given mask keeps that is still kept, 0 to 1
    l2_kept          the same of the sum of w^2
    added, removed   mask entries that changed: False to True, True to False
    """

    name: str
    rows: int
    rows_kept: int
    density_before: float
    density_after: float
    l1_kept: float
    l2_kept: float
    added: int
    removed: int


@dataclass(frozen=True)
class Coarsened:
    """The new masks and, per layer, what changed. `str()` is a table."""

    masks: Masks
    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        header = ("weight", "rows kept", "density", "after", "|w| kept", "w^2 kept", "added", "removed")
        return str(tabulate([_cells(layer) for layer in self.layers], header, disable_numparse=True))


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
    found: dict[str, Tensor] = {}
    layers = []
    for name, mask in Masks(masks).items():
        found[name] = mask
        if mask.dim() >= 2 and mask.numel():
            weight = _weight(name, mask, weights)
            keep = _row_budget(mask, extra, round_to)
            found[name] = _whole_rows(weight, mask, criterion, keep)
            layers.append(_layer(name, weight, mask, found[name]))
    return Coarsened(Masks(found), tuple(layers))


def _row_budget(mask: Tensor, extra: float, round_to: int) -> int:
    """How many of the rows to keep, at least 1. In integers: 0.3 * 10 in floats is above 3."""
    rows = mask.shape[0]
    keep = max(1, -(-int(mask.sum()) * rows // mask.numel()))
    keep += math.floor((rows - keep) * Fraction(str(extra)))
    return min(rows, -(-keep // round_to) * round_to)


def _whole_rows(weight: Tensor, mask: Tensor, criterion: str, keep: int) -> Tensor:
    """The mask [O, ...] of the `keep` most important rows."""
    values = mask if criterion == "count" else weight.abs() * mask
    # float64, so that the order does not hang on the order of summation
    importance = values.flatten(1).sum(1, dtype=torch.float64)
    chosen = importance.argsort(descending=True, stable=True)[:keep]
    refilled = torch.zeros_like(mask)
    refilled[chosen] = True
    return refilled


def _layer(name: str, weight: Tensor, mask: Tensor, refilled: Tensor) -> Layer:
    both = mask & refilled
    return Layer(
        name=name,
        rows=mask.shape[0],
        rows_kept=int(refilled.flatten(1).any(1).sum()),
        density_before=int(mask.sum()) / mask.numel(),
        density_after=int(refilled.sum()) / mask.numel(),
        l1_kept=_share(weight.abs(), both, mask),
        l2_kept=_share(weight.double().square(), both, mask),
        added=int((refilled & ~mask).sum()),
        removed=int((mask & ~refilled).sum()),
    )


def _share(values: Tensor, part: Tensor, whole: Tensor) -> float:
    """Sum over `part` divided by the sum over `whole`; 1.0 when there was nothing to lose."""
    total = float((values * whole).sum(dtype=torch.float64))
    return float((values * part).sum(dtype=torch.float64)) / total if total else 1.0


def _cells(layer: Layer) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.rows_kept} of {layer.rows}",
        f"{layer.density_before:.3f}",
        f"{layer.density_after:.3f}",
        f"{layer.l1_kept:.1%}",
        f"{layer.l2_kept:.1%}",
        str(layer.added),
        str(layer.removed),
    )


def _weight(name: str, mask: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    if name not in weights:
        raise MaskError(
            f"mask for {name!r}",
            expected="the name of one of the weights",
            got=f"a name that is not among the {len(weights)} weights",
            do=near(name, weights) or "Give the weight too, or leave its mask out and add it to the result.",
        )
    weight = weights[name].detach().to(mask.device)
    if weight.shape != mask.shape:
        raise MaskError(
            f"mask for {name!r}",
            expected=f"the weight's shape {tuple(weight.shape)}",
            got=str(tuple(mask.shape)),
            do="A mask is one bool per weight, True = kept.",
        )
    wrong = int((~weight.isfinite()).sum())
    if wrong:
        raise InputError(
            f"weight {name!r}",
            expected="finite numbers",
            got=f"{wrong} NaN or infinite of {weight.numel()}",
            do="Training has diverged: lower the learning rate or use an earlier checkpoint.",
        )
    return weight


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
