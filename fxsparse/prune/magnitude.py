"""Global magnitude pruning: keep the weights that are largest in absolute value, over all layers together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.errors import InputError
from fxsparse.ir.masks import Masks, weight_of_mask
from fxsparse.prune.largest import largest
from fxsparse.prune.prunable import refuse_model


def magnitude(weights: Mapping[str, Tensor], density: float, *, masks: Mapping[str, Tensor] | None = None) -> Masks:
    """Keep the round(density * total) weights of largest |w|, counted over all of `weights` together.

    weights  parameter name -> float tensor of any shape, as `prunable(model)` gives them
    density  fraction of all weights to keep, 0 < density <= 1
    masks    weights already pruned stay pruned: only the kept ones are ranked; a name without a mask is all kept

    The count is exact. Of equal magnitudes the earlier one is kept: earlier name, then lower flat index.
    Warns when a layer is left without weights. Raises InputError on a NaN, on a density outside the range, and on a
    density above that of `masks`. Source: one-shot magnitude pruning (OMP); within rounds, Frankle & Carbin (2019).
    """
    keep = budget(weights, density)
    scores = {name: _score(name, weight) for name, weight in weights.items()}
    kept = sum(weight.numel() for weight in weights.values())
    if masks is not None:
        kept = _pruned_last(scores, weights, masks)
    if keep > kept:
        raise InputError(
            f"density {density:g}",
            expected=f"at most {kept / sum(s.numel() for s in scores.values()):g}, the density of the given masks",
            got=f"{keep} weights to keep, and the masks keep {kept}",
            do="Pruned weights are not brought back here; leave masks out to rank every weight.",
        )
    return keep_largest(scores, weights, keep)


def budget(weights: Mapping[str, Tensor], density: float) -> int:
    """round(density * number of weights). Raises InputError unless 0 < density <= 1 and there is a weight."""
    refuse_model(weights)
    total = sum(weight.numel() for weight in weights.values())
    if not total:
        raise InputError(
            "weights",
            expected="at least one tensor with elements",
            got=f"{len(weights)} tensors and no element",
            do="fxsparse.prune.prunable(model) gives a model's convolution and linear weights; it skips the head.",
        )
    if not 0 < density <= 1:
        raise InputError(
            f"density {density!r}",
            expected="a fraction of weights to keep, 0 < density <= 1",
            got=f"{density!r}",
            do="density = 1 - sparsity: 80 % zeros is density 0.2.",
        )
    return round(density * total)


def keep_largest(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor], keep: int) -> Masks:
    """`largest_of_all`, with a warning when a layer is left without weights: the last step of every first mask."""
    found = largest_of_all(scores, weights, keep)
    _warn_of_empty(found)
    return found


def largest_of_all(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor], keep: int) -> Masks:
    """Masks of exactly `keep` True: the largest scores, of equal scores the earlier.

    scores   name -> float [numel of the weight], no NaN
    weights  the same names in the same order -> the weight, for its shape and device
    """
    kept = largest(torch.cat(list(scores.values())), keep)
    parts = zip(weights.items(), torch.split(kept, [score.numel() for score in scores.values()]), strict=True)
    return Masks({name: part.view(weight.shape).to(weight.device) for (name, weight), part in parts})


def _score(name: str, weight: Tensor) -> Tensor:
    """|w|, flat, on the CPU so that every device ranks alike. Half precision is widened; the order stays the same."""
    score = weight.detach().reshape(-1).cpu().abs()
    score = score if score.dtype == torch.float64 else score.float()
    wrong = int(score.isnan().sum())
    if wrong:
        raise InputError(
            f"weight {name!r}",
            expected="numbers that can be ranked",
            got=f"{wrong} NaN of {score.numel()}",
            do="Training has diverged: lower the learning rate or prune an earlier checkpoint.",
        )
    return score


def _pruned_last(scores: dict[str, Tensor], weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
    """Give pruned weights the score -1, below every magnitude. Returns how many weights are kept."""
    for name, mask in Masks(masks).items():
        weight_of_mask(name, mask, weights, "Give masks of the weights to rank only.")
        scores[name] = scores[name].masked_fill(~mask.reshape(-1).cpu(), -1)
    return sum(int((score >= 0).sum()) for score in scores.values())


def _warn_of_empty(masks: Masks) -> None:
    empty = [name for name, mask in masks.items() if mask.numel() and not bool(mask.any())]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(masks)} layers are left without weights, the first is {empty[0]!r}: "
            "nothing passes through them. A higher density, or exclude, keeps them.",
            stacklevel=4,
        )
