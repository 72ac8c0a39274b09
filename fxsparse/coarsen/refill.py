"""Refill: an unstructured mask becomes whole rows (output channels), with the same budget per layer.

per layer, mask m and trained weight w, both [O, n] with one row per output channel:
    s_i = sum_j |m_ij w_ij|                      # importance of row i
    k   = ceil(density(m) * O)                   # the layer's own budget, at least 1
    m'  = 1 on the k rows of largest s, all n entries; 0 on the others
Layers that share channels can choose together: s is then the sum of theirs, the density that of all of them.
Source: Chen et al., Coarsening the Granularity (ICML 2022), Algorithm 2; `refill_plus` is its Refill+.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fxsparse.coarsen.channel_features import FEATURES
from fxsparse.coarsen.each_layer import each_layer
from fxsparse.coarsen.given import layers_of
from fxsparse.coarsen.report import Coarsened, RowGroup
from fxsparse.errors import InputError, MaskError, near
from fxsparse.ir.masks import Masks

CRITERIA = ("l1", "count", *FEATURES)


def refill(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    criterion: str = "l1",
    extra: float = 0.0,
    round_to: int = 1,
    features: Mapping[str, Tensor] | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> Coarsened:
    """Keep the most important rows of every masked weight, whole, and drop the other rows.

    weights    parameter name -> float [O, ...], one row per output channel; trained, with or without the mask applied
    masks      parameter name -> the weight's shape, True = kept; weights without a mask stay dense
    criterion  importance of a row: "l1", the sum of |w| its mask keeps; "count", how many its mask keeps; "feature_l1",
               "feature_l2" or "saliency", what `features` says
    extra      share of the dropped rows to bring back (Refill+; the paper's pair of densities implies 0.2)
    round_to   round the number of rows up to a multiple of this, at most O
    features   for the last three criteria: parameter name -> [O], as `channel_features` gives them
    groups     lists of parameters that keep the same rows, as `coupled_weights` gives them: what a residual stage adds
               up can be removed only where all of them drop it. A parameter without a mask couples nothing

    Of equally important rows the lower one is kept. Masks with fewer than two dimensions (biases, norms) are passed
    on as they are. Every row of a weight counts as a feature: leave out a classification head, as `prunable` does.
    This changes the function: fine-tune afterwards, with the refilled weights as `imp`'s `rewind_state` has them.
    Raises InputError on an unknown criterion, an `extra` or `round_to` outside its range, features that do not fit and
    weights that are NaN or infinite; MaskError on a mask that fits no weight and on groups that cannot choose together.
    """
    _check_options(criterion, extra, round_to)
    given = Masks(masks)
    importance = {n: _importance(n, w, m, criterion, features) for n, w, m in layers_of(weights, given)}
    together = _together(groups, importance)

    def rule(name: str, weight: Tensor, mask: Tensor) -> tuple[tuple[RowGroup, ...], str]:
        members = together.get(name, (name,))
        keep = _row_budget([given[n] for n in members], extra, round_to)
        score = torch.stack([importance[n] for n in members]).sum(0)
        rows = score.argsort(descending=True, stable=True)[:keep].sort().values
        return (RowGroup(rows, torch.arange(mask[0].numel())),), ""

    return each_layer(weights, given, rule)


def refill_plus(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    criterion: str = "l1",
    round_to: int = 1,
    features: Mapping[str, Tensor] | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> Coarsened:
    """`refill` with a fifth of the dropped rows brought back, the share that the paper's densities of Refill+ imply."""
    return refill(
        weights, masks, criterion=criterion, extra=0.2, round_to=round_to, features=features, groups=groups
    )  # fmt: skip


def _row_budget(masks: Sequence[Tensor], extra: float, round_to: int) -> int:
    """How many of the rows to keep, at least 1. In integers: 0.3 * 10 in floats is above 3."""
    rows = masks[0].shape[0]
    kept, size = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    keep = max(1, -(-kept * rows // size))
    keep += math.floor((rows - keep) * Fraction(str(extra)))
    return min(rows, -(-keep // round_to) * round_to)


def _importance(
    name: str, weight: Tensor, mask: Tensor, criterion: str, features: Mapping[str, Tensor] | None
) -> Tensor:
    """Importance of every row, float64 [O] on the CPU: so the order does not hang on the order of summation."""
    if criterion in FEATURES:
        return _feature(name, mask, criterion, features or {})
    values = mask if criterion == "count" else weight.abs() * mask
    return values.flatten(1).sum(1, dtype=torch.float64).cpu()


def _feature(name: str, mask: Tensor, criterion: str, features: Mapping[str, Tensor]) -> Tensor:
    score = features.get(name)
    if score is None:
        raise InputError(
            f"features of {name!r}",
            expected=f"a score per row, for the criterion {criterion!r}",
            got="none",
            do=f"features=channel_features(model, masks, batches, {criterion!r}) makes them.",
        )
    if tuple(score.shape) != mask.shape[:1] or not bool(score.isfinite().all()):
        raise InputError(
            f"features of {name!r}",
            expected=f"{mask.shape[0]} finite numbers, one per row",
            got=f"shape {tuple(score.shape)}" if tuple(score.shape) != mask.shape[:1] else "NaN or infinity among them",
            do="channel_features makes them for the same model.",
        )
    return score.detach().double().cpu()


def _together(groups: Sequence[Sequence[str]], importance: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """For every grouped parameter that has a mask, all of those of its group that have one."""
    found: dict[str, tuple[str, ...]] = {}
    for group in groups:
        members = tuple(dict.fromkeys(name for name in group if name in importance))
        for name in members:
            if name in found:
                raise MaskError(
                    f"groups, {name!r}", expected="each parameter in one group", got="it in two of them",
                    do="Make one group of the two: they share its rows.",
                )  # fmt: skip
            if importance[name].shape != importance[members[0]].shape:
                raise MaskError(
                    f"groups, {name!r}",
                    expected=f"as many rows as {members[0]!r} has, {len(importance[members[0]])}",
                    got=str(len(importance[name])),
                    do="Only weights that write the same channels can choose rows together; see coupled_weights.",
                )
            found[name] = members
    return found


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
