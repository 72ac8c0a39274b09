"""Calls `shuffled_block.cpp` on tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.kernels import build
from fxsparse.kernels.build import function, int64s
from fxsparse.kernels.shared import ACTIVATIONS, LANES

_NUMBER = {name: i for i, name in enumerate(ACTIVATIONS)}
_NAMES = {torch.float32: "fxsparse_shuffled_block_f32", torch.bfloat16: "fxsparse_shuffled_block_bf16"}


def run(
    x: Tensor,
    y: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Sequence[Sequence[int]],
    activation: str,
    lanes: str = "rows",
    isa: str | None = None,
    *,
    planes: bool = False,
) -> None:
    """Write y [N, OH, OW, O], contiguous, for x [N, H, W, I]; they and `values` all float32 or all bfloat16.

    packed    values, value_ptr, columns, column_ptr, rows, row_ptr as fxsparse.formats.shuffled_block describes them
    geometry  kernel, stride, padding, dilation, two ints each
    planes    x is [N, I, H, W] in memory; else contiguous. Only with rows in lanes
    bias and residual have the dtype of x.
    """
    values, value_ptr, columns, column_ptr, rows, row_ptr = packed
    kernel, stride, padding, dilation = geometry
    sizes = (
        *x.shape, *y.shape[1:], *kernel, *stride, *padding, *dilation, row_ptr.shape[0] - 1,
        _NUMBER[activation], torch.get_num_threads(), LANES.index(lanes), planes,
    )  # fmt: skip
    function("shuffled_block", _NAMES[x.dtype], 11, isa)(
        int64s(sizes), x.data_ptr(), y.data_ptr(), values.data_ptr(), value_ptr.data_ptr(), columns.data_ptr(),
        column_ptr.data_ptr(), rows.data_ptr(), row_ptr.data_ptr(), bias.data_ptr() if bias is not None else None,
        residual.data_ptr() if residual is not None else None,
    )  # fmt: skip


@functools.cache
def register_operator() -> None:
    """Give `fxsparse::shuffled_block_into` its kernel for the CPU, called from C++ without Python in between."""
    build.register_operator("shuffled_block", tuple(_NAMES.values()))
