"""What the user gave: weights that fit their masks, and which masks can be coarsened at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fxsparse.errors import InputError, MaskError, near
from fxsparse.ir.masks import Masks, weight_of_mask
from fxsparse.prune.prunable import refuse_model

Density = float | Mapping[str, float] | None


def layers_of(weights: Mapping[str, Tensor], masks: Masks) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and mask of every mask with rows and columns. Raises MaskError, InputError: see `weight_of`.

    InputError for a model in place of its weights, too.
    """
    refuse_model(weights)
    for name, mask in masks.items():
        if mask.dim() >= 2 and mask.numel():
            yield name, weight_of(name, mask, weights), mask


def weight_of(name: str, mask: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The weight of a mask, on its device. MaskError when there is none of that shape, InputError on NaN, infinity."""
    otherwise = "Give the weight too, or leave its mask out and add it to the result."
    weight = weight_of_mask(name, mask, weights, otherwise).detach().to(mask.device)
    wrong = int((~weight.isfinite()).sum())
    if wrong:
        raise InputError(
            f"weight {name!r}",
            expected="finite numbers",
            got=f"{wrong} NaN or infinite of {weight.numel()}",
            do="Training has diverged: lower the learning rate or use an earlier checkpoint.",
        )
    return weight


def energy_of(weight: Tensor, mask: Tensor) -> Tensor:
    """w^2 where the mask keeps it, scaled to a mean of 1, as float32 [O, n] on the CPU; the mask itself if all w are 0.

    The scale keeps squares of weights below 1e-19 from vanishing; nothing here depends on it otherwise.
    """
    kept = torch.where(mask, weight, 0).flatten(1).cpu().double().square()
    mean = kept.mean()
    return (kept / mean).float() if mean > 0 else mask.flatten(1).cpu().float()


def check_rows(name: str, rows: int) -> None:
    """Raises InputError unless `rows` is a positive whole number."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise InputError(
            f"{name} {rows!r}",
            expected="a positive number of rows",
            got=repr(rows),
            do="32 or 64 suit a CPU with wide vectors; 64 or 128 suit tensor cores.",
        )


def budget_of(name: str, mask: Tensor, density: Density) -> int:
    """Weights to keep, rounded down so that the density is never exceeded."""
    own = density.get(name) if isinstance(density, Mapping) else density
    return int(mask.sum()) if own is None else int(own * mask.numel() + 1e-6)


def check_density(density: Density, masks: Masks) -> None:
    """Raises MaskError on a name without a mask, InputError unless 0 <= density <= 1."""
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


def excluded_masks(masks: Masks, exclude: Iterable[str]) -> set[str]:
    """The masks that `exclude` names: itself, or everything inside of the module of that name. MaskError for none."""
    named: set[str] = set()
    for given in (exclude,) if isinstance(exclude, str) else exclude:
        inside = {name for name in masks if name == given or name.startswith(f"{given}.")}
        if not inside:
            raise MaskError(f"exclude {given!r}", expected="the name of a mask, or of a module with masks",
                            got=f"a name that none of the {len(masks)} masks has",
                            do=near(given, masks) or "Leave it out: what has no mask stays as it is.")  # fmt: skip
        named |= inside
    return named
