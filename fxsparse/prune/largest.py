"""Which elements are the largest, exactly so many of them."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` largest elements, of equal ones those of lower flat index. Any shape; no NaN."""
    flat = scores.reshape(-1)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        threshold = torch.kthvalue(flat, flat.numel() - count + 1).values
        kept = flat > threshold
        tied = (flat == threshold).nonzero().flatten()
        kept[tied[: count - int(kept.sum())]] = True
    return kept.view(scores.shape)
