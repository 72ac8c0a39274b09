"""Flattened inputs: their batch size and device, and what a build does to them first, by a name that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Prepare = Callable[[Sequence[Any]], Sequence[Any]]


def batch_size(inputs: Iterable[Any]) -> int:
    """Dimension 0 of the first tensor that has dimensions; 1 without one."""
    return next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim()), 1)


def device_of(inputs: Iterable[Any]) -> torch.device:
    """Of the first tensor; the CPU without one."""
    return next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))


def in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x` with its dimensions in memory in this order, the one with the largest stride first."""
    return x.permute(list(order)).contiguous().permute(sorted(order, key=lambda dim: order[dim]))


def as_is(inputs: Sequence[Any]) -> Sequence[Any]:
    """The inputs themselves."""
    return inputs


def inputs_channels_last(inputs: Sequence[Any]) -> Sequence[Any]:
    """Images in channels_last, all else as it is."""
    return [channels_last(x) for x in inputs]


def channels_last(x: Any) -> Any:
    """`x` in channels_last when it is a tensor of four dimensions."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


LAYOUTS: dict[str, Prepare] = {"as is": as_is, "channels_last": inputs_channels_last}
