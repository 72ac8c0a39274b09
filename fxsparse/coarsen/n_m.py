"""N:M: in every group of M neighboring input channels the N largest weights are kept, row by row and tap by tap.

Source: magnitude 2:4 pruning, Mishra et al., Accelerating Sparse Deep Neural Networks (2021); N:M in general, Zhou et
al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (ICLR 2021).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fxsparse.coarsen.given import excluded_masks, layers_of
from fxsparse.coarsen.report import Coarsened, describe
from fxsparse.formats.n_m import check_pattern
from fxsparse.ir.masks import Masks

_log = logging.getLogger("fxsparse")


def n_m(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    n: int = 2,
    m: int = 4,
    exclude: Iterable[str] = (),
) -> Coarsened:
    """Keep at most `n` of every `m` weights: the largest |w| of those that the mask keeps. Nothing is added.

    weights  parameter name -> float [O, I] or [O, I, ...]; groups are taken along I, for every row and tap apart
    masks    parameter name -> the weight's shape, True = kept; all ones to start from a dense model
    m        2, 4, 8 or 16; 0 < n < m
    exclude  masks to pass on as they are: their names, or modules, "layer1" for all inside of it

    Of equal weights the earlier column is kept. Weights with I not a multiple of `m` (depthwise convolutions, images)
    and masks of fewer than two dimensions are passed on, and the report says so. An N:M mask has no row groups. This
    changes the function: fine-tune afterwards. Raises InputError on another pattern and on weights that are NaN or
    infinite, MaskError on a mask that fits no weight and on an exclusion that names no mask.
    """
    check_pattern(n, m)
    given = Masks(masks)
    excluded = excluded_masks(given, exclude)
    found: dict[str, Tensor] = dict(given)
    layers = []
    for name, weight, mask in layers_of(weights, given):
        _log.info("coarsen %s", name)
        why = "excluded" if name in excluded else _why_not(mask, m)
        if not why:
            found[name] = largest_of_every(weight, mask, n, m)
        layers.append(describe(name, weight, mask, found[name], (), f"kept as it was: {why}" if why else ""))
    return Coarsened(Masks(found), tuple(layers), {layer.name: () for layer in layers})


def _why_not(mask: Tensor, m: int) -> str:
    return f"{mask.shape[1]} input channels are no multiple of {m}" if mask.shape[1] % m else ""


def largest_of_every(weight: Tensor, mask: Tensor, n: int, m: int) -> Tensor:
    """The mask of the N largest of every M along dimension 1. All of one shape."""
    size = weight.abs().masked_fill(~mask, -1).unflatten(1, (-1, m))
    order = size.sort(dim=2, descending=True, stable=True).indices.narrow(2, 0, n)
    kept = torch.zeros_like(size, dtype=torch.bool).scatter_(2, order, True)
    return kept.flatten(1, 2) & mask
