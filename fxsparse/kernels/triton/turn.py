"""The Triton kernel that turns a matrix: y[column, row] = x[row, column].

Both sides are read and written along their lines. Stores of single 16-bit numbers, one to a line, took an H200 430 us
for 29 million of them, more than the product before them (docs/architecture.md).
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr, tensor

from fxsparse.kernels.triton.shuffled_block import INTERPRETED

__all__ = ["INTERPRETED", "launch"]
SIDE = 64


@triton.jit  # type: ignore[untyped-decorator]
def turn(x: tensor, y: tensor, rows: tensor, columns: tensor, BLOCK: constexpr) -> tensor:
    """From x [rows, columns] to y [columns, rows], both contiguous; one program id per tile."""
    across = tl.cdiv(columns, BLOCK)
    pid = tl.program_id(0)
    row = (pid // across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = (pid % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    read = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row[:, None] * columns + column[None, :], mask=read)
    written = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(y + column[:, None] * rows + row[None, :], tl.trans(tile), mask=written)


def launch(x: Tensor, y: Tensor) -> None:
    """Write x [rows, columns] into y [columns, rows], turned."""
    rows, columns = x.shape
    grid = (triton.cdiv(rows, SIDE) * triton.cdiv(columns, SIDE),)
    with torch.cuda.device_of(x):
        turn[grid](x, y, rows, columns, BLOCK=SIDE)
