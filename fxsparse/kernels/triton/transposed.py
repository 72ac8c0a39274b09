"""The Triton kernel of the shuffled block format for linear layers whose tokens lie side by side.

    y[rows[r], token] = activation(sum_k values[k, r] * x[columns[k], token] + bias[rows[r]])

A kept column is a whole row of x [I, tokens] here, so gathering takes 16 bytes at a time, asynchronously, and rows of y
may lie anywhere. With x [tokens, I] neighbors of a column are other columns, and on an H200 that kernel
(`shuffled_block.py`) ran at a tenth of this one's speed.

A program owns BLOCK_N rows of one group and BLOCK_M tokens. Groups run fastest over the program ids, so that programs
that read the same tokens run together.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr, tensor

from fxsparse.kernels.triton import Tiles
from fxsparse.kernels.triton.shuffled_block import INTERPRETED, _activate, _extent, config, precision

MULTIPROCESSORS = 132  # of an H100 or H200; others differ by little


@triton.jit  # type: ignore[untyped-decorator]
def transposed(
    x: tensor, rows: tensor, row_ptr: tensor, columns: tensor, column_ptr: tensor, values: tensor, value_ptr: tensor,
    bias: tensor, y: tensor, tokens: tensor, groups: tensor, rows_per_group: tensor,
    ACTIVATION: constexpr, PRECISION: constexpr, WIDEN: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
) -> tensor:  # fmt: skip
    """Tensors as in `shuffled_block_transposed`; `bias` may be None; one program id per tile."""
    slots = tl.cdiv(rows_per_group, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // slots % groups
    token = pid // (slots * groups) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_row, row_count, first_column, column_count, start, lanes = _extent(group, row_ptr, column_ptr, value_ptr)
    for row0 in range(pid % slots * BLOCK_N, row_count, slots * BLOCK_N):
        lane = row0 + tl.arange(0, BLOCK_N)
        z = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for column0 in range(0, column_count, BLOCK_K):
            k = column0 + tl.arange(0, BLOCK_K)
            valid = (k < column_count)[:, None]
            column = tl.load(columns + first_column + k, mask=k < column_count, other=0).to(tl.int64)
            read = column[:, None] * tokens + token[None, :]
            tile = tl.load(x + read, mask=valid & (token < tokens)[None, :], other=0.0)
            stored = start + k[:, None] * lanes + lane[None, :]
            weight = tl.load(values + stored, mask=valid & (lane < lanes)[None, :], other=0.0)
            if WIDEN:
                tile = tile.to(tl.float32)
                weight = weight.to(tl.float32)
            z = tl.dot(tl.trans(weight), tile, z, input_precision=PRECISION)
        valid_row = lane < row_count
        row = tl.load(rows + first_row + lane, mask=valid_row, other=0)
        if bias is not None:
            z += tl.load(bias + row, mask=valid_row, other=0.0).to(tl.float32)[:, None]
        z = _activate(z, ACTIVATION).to(y.dtype.element_ty)
        written = row.to(tl.int64)[:, None] * tokens + token[None, :]
        tl.store(y + written, z, mask=valid_row[:, None] & (token < tokens)[None, :])


def choose_tiles(tokens: int, groups: int, rows_per_group: int, dtype: torch.dtype) -> Tiles:
    """Tiles by rule, after what was fastest of a dozen on an H200 (docs/architecture.md)."""
    rows = min(128, max(16, triton.next_power_of_2(rows_per_group)))
    if dtype == torch.float32:
        return Tiles(64 if rows == 128 else 128, rows, 32, 8 if rows >= 64 else 4)
    programs = groups * triton.cdiv(rows_per_group, rows)
    wide, waves = (128, 1) if rows == 128 else (256, 4)
    enough = triton.cdiv(tokens, wide) * programs >= waves * MULTIPROCESSORS
    return Tiles(wide if enough else 64, rows, 64, 4, 4)


def launch(
    x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, activation: str, tiles: Tiles | None
) -> None:  # fmt: skip
    """Write every packed row of `y`. Arguments are those of `shuffled_block_transposed`, checked; nothing is empty."""
    tokens, groups = x.shape[1], packed[1].numel() - 1
    rows_per_group = triton.cdiv(packed[0].numel(), groups)
    tiles = tiles or choose_tiles(tokens, groups, rows_per_group, x.dtype)
    meta: dict[str, Any] = config(tiles).all_kwargs()
    # The interpreter multiplies bfloat16 as if its bits were integers (Triton 3.8).
    meta |= {"ACTIVATION": activation, "PRECISION": precision(), "WIDEN": INTERPRETED and x.dtype == torch.bfloat16}
    grid = (triton.cdiv(tokens, tiles.pixels) * groups * triton.cdiv(rows_per_group, tiles.rows),)
    with torch.cuda.device_of(x):
        transposed[grid](x, *packed, bias, y, tokens, groups, rows_per_group, **meta)
