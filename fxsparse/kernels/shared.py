"""What the kernels for CPUs and GPUs have in common: their epilogue, and the sizes a window leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

# The order is that of `enum Activation` in cpu/shuffled_block.cpp.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


LANES = ("rows", "pixels")  # what vector lanes hold, in the order of `enum Lanes` in cpu/shuffled_block.h


def epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """act(y + bias + residual), in PyTorch's own operators."""
    for term in (bias, residual):
        y = y if term is None else y + term
    return ACTIVATIONS[activation](y)


def output_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Positions of a window along every dimension; below 1 where it does not fit into the padded image."""
    steps = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in steps]
