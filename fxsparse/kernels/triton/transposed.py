"""The Triton kernel of the shuffled block format for linear layers whose tokens lie side by side.

    y[rows[r], token] = activation(sum_k values[k, r] * x[columns[k], token] + bias[rows[r]])

A kept column is a whole row of x [I, tokens] here, so gathering takes 16 bytes at a time, asynchronously, and rows of y
may lie anywhere. With x [tokens, I] neighbors of a column are other columns, and on an H200 that kernel
(`shuffled_block.py`) ran at a tenth of this one's speed.

A program owns BLOCK_N rows of one group and BLOCK_M tokens. Programs that run together share tokens and weights: ids
run over SPAN tiles of tokens, then over groups. What takes time between two products is less memory than working out
addresses (an H200's counters, docs/architecture.md). So 32 bits count where they can, and tokens and lanes that a tile
has too many of have no mask: what is read for them is never stored.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr, tensor

from fxsparse.kernels.triton import MULTIPROCESSORS, Tiles
from fxsparse.kernels.triton.shuffled_block import INTERPRETED, _activate, _extent, config, precision

SPAN = 8  # tiles of tokens
WIDE_FROM = 2**31  # elements of x
MANY = 768  # columns of a group, for which longer rounds pay
VECTOR = 8  # elements that are fetched at once, if x and values lie so


@triton.jit  # type: ignore[untyped-decorator]
def transposed(
    x: tensor, rows: tensor, row_ptr: tensor, columns: tensor, column_ptr: tensor, values: tensor, value_ptr: tensor,
    bias: tensor, y: tensor, tokens: tensor, groups: tensor, rows_per_group: tensor,
    ACTIVATION: constexpr, PRECISION: constexpr, WIDEN: constexpr, WIDE: constexpr, SPAN: constexpr, VECTOR: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
) -> tensor:  # fmt: skip
    """Tensors as in `shuffled_block_transposed`; `bias` may be None; WIDE: x has more elements than 31 bits count."""
    slots = tl.cdiv(rows_per_group, BLOCK_N)
    pid = tl.program_id(0)
    first_tile = pid // (SPAN * slots * groups) * SPAN
    tiles = min(tl.cdiv(tokens, BLOCK_M) - first_tile, SPAN)
    inside = pid % (SPAN * slots * groups)
    token = (first_tile + inside % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    group, slot = inside // tiles // slots, inside // tiles % slots
    first_row, row_count, first_column, column_count, start, lanes = _extent(group, row_ptr, column_ptr, value_ptr)
    across = x + tl.max_contiguous(tl.multiple_of(token % tokens, VECTOR), VECTOR)
    for row0 in range(slot * BLOCK_N, row_count, slots * BLOCK_N):
        lane = row0 + tl.arange(0, BLOCK_N)
        z = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        k = tl.arange(0, BLOCK_K)
        column = tl.load(columns + first_column + k, mask=k < column_count, other=0)
        stored = values + start + tl.max_contiguous(tl.multiple_of(lane % lanes, VECTOR), VECTOR)[None, :]
        stored += k[:, None] * lanes
        for column0 in range(0, column_count, BLOCK_K):
            k = column0 + tl.arange(0, BLOCK_K)
            valid = (k < column_count)[:, None]
            down = (column.to(tl.int64) if WIDE else column) * tokens
            tile = tl.load(across[None, :] + down[:, None], mask=valid, other=0.0)
            weight = tl.load(stored, mask=valid, other=0.0)
            stored += BLOCK_K * lanes
            # A round ahead: where an address was loaded in the same round, Triton's pipeline has half as many stages.
            column = tl.load(columns + first_column + k + BLOCK_K, mask=k + BLOCK_K < column_count, other=0)
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


def choose_tiles(tokens: int, groups: int, rows_per_group: int, columns_per_group: int, dtype: torch.dtype) -> Tiles:
    """Tiles by rule, after what was fastest of a dozen on an H200 (docs/architecture.md)."""
    rows = min(128, max(16, triton.next_power_of_2(rows_per_group)))
    many = columns_per_group >= MANY
    if dtype == torch.float32:
        fastest = {128: Tiles(64, 128, 32, 8, 2), 64: Tiles(128, 64, 16), 32: Tiles(128, 32, 32, 4, 2)}
    else:
        fastest = {128: Tiles(128, 128, 64 if many else 32), 64: Tiles(256 if many else 128, 64, 32)}
        fastest[32] = Tiles(128, 32, 128, 4, 2)
    tiles = fastest.get(rows, Tiles(256, 16, 32, 4, 4))
    programs = groups * triton.cdiv(rows_per_group, rows) * triton.cdiv(tokens, tiles.pixels)
    most = tiles.pixels if programs > MULTIPROCESSORS // 2 else 64
    return tiles._replace(pixels=min(most, max(16, triton.next_power_of_2(tokens))))


def launch(
    x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, activation: str, tiles: Tiles | None
) -> None:  # fmt: skip
    """Write every packed row of `y`. Arguments are those of `shuffled_block_transposed`, checked; nothing is empty."""
    tokens, groups = x.shape[1], packed[1].numel() - 1
    rows_per_group = triton.cdiv(packed[0].numel(), groups)
    tiles = tiles or choose_tiles(tokens, groups, rows_per_group, packed[2].numel() // groups, x.dtype)
    meta: dict[str, Any] = config(tiles).all_kwargs()
    # The interpreter multiplies bfloat16 as if its bits were integers (Triton 3.8).
    meta |= {"ACTIVATION": activation, "PRECISION": precision(), "WIDEN": INTERPRETED and x.dtype == torch.bfloat16}
    vector = next(v for v in (VECTOR, 4, 2, 1) if tokens % v == 0)
    meta |= {"WIDE": x.numel() >= WIDE_FROM, "SPAN": SPAN, "VECTOR": vector}
    grid = (triton.cdiv(tokens, tiles.pixels) * groups * triton.cdiv(rows_per_group, tiles.rows),)
    with torch.cuda.device_of(x):
        transposed[grid](x, *packed, bias, y, tokens, groups, rows_per_group, **meta)
