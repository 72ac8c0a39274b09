"""Random pruning: the baseline that every other first mask is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.ir.masks import Masks
from fxsparse.prune.magnitude import budget, keep_largest


def random(weights: Mapping[str, Tensor], density: float, *, seed: int) -> Masks:
    """Keep round(density * total) weights chosen uniformly over all of `weights` together.

    weights  parameter name -> tensor of any shape; the values are not looked at
    density  fraction of all weights to keep, 0 < density <= 1
    seed     the same seed and shapes give the same masks, on every device; torch's own generator is not touched

    The count is exact. Warns when a layer is left without weights. Raises InputError on a density outside the range.
    """
    keep = budget(weights, density)
    sizes = [weight.numel() for weight in weights.values()]
    # ranks, not uniform numbers: no two are equal
    ranks = torch.randperm(sum(sizes), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return keep_largest(dict(zip(weights, torch.split(ranks, sizes), strict=True)), weights, keep)
