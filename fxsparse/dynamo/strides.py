"""Outputs as eager code would give them: its strides, and memory of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxsparse.ir.inputs import in_order


def order_of(value: Any) -> list[int] | None:
    """Dimensions from the largest stride to the smallest; None where there is none to keep."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    strides = [s if isinstance(s, int) else s.node.hint for s in value.stride()]  # read without a guard
    return None if 0 in strides else sorted(range(len(strides)), key=lambda d: -strides[d])


def laid_out(y: Any, order: list[int] | None) -> Any:
    """`y` in the strides that eager gives: Python code that reads them was traced with those."""
    if order is None or not isinstance(y, Tensor):
        return y
    if order == sorted(order):
        return y.contiguous()
    return in_order(y, order)


def apart(values: Iterator[Any]) -> Iterator[Any]:
    """Copies where two outputs share memory, which eager's do not."""
    seen = set()
    for y in values:
        if isinstance(y, Tensor) and y.numel():
            pointer = y.untyped_storage().data_ptr()
            y = y.clone() if pointer in seen else y
            seen.add(pointer)
        yield y
