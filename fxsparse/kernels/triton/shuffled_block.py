"""The Triton kernel of the shuffled block format: convolution as implicit GEMM, one row group at a time.

    y[pixel, rows[r]] = activation(sum_k x[pixel, columns[k]] * values[k, r] + bias[rows[r]] + residual[pixel, rows[r]])

A program owns BLOCK_M output pixels and one group. It walks the group's kept columns BLOCK_K at a time: the columns say
where to gather in x, the gathered tile and the tile of values meet in one `tl.dot`. Groups run fastest over the program
ids, so that programs that read the same pixels run together; a group wider than BLOCK_N takes several programs, and
a program strides over the tiles of a group that is wider than the average one.

Gathered elements are loaded one by one, 16-bit ones not even asynchronously, about 15 instructions each: on an H200
dense convolutions are three to five times as fast in 16 bits and in tf32, and half as fast in float32 without it.
Linear layers have a kernel of their own (`transposed.py`).

This module imports Triton: import `fxsparse.kernels.triton`, which does not, and says so when Triton is missing.
Triton reads the annotations of a kernel and knows only its own names in them; they must not become strings either.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr, tensor

from fxsparse.kernels.triton import Tiles


@triton.jit  # type: ignore[untyped-decorator]
def _inside(
    top: tensor, left: tensor, height: tensor, width: tensor, dilation_h: tensor, dilation_w: tensor,
    KERNEL_H: constexpr, KERNEL_W: constexpr,
) -> tensor:  # fmt: skip
    """A bit for each ky and then for each kx, [BLOCK_M]: does a tap there read inside the image?

    Made once, these spare the loop four comparisons for every gathered element.
    """
    word: constexpr = tl.int32 if KERNEL_H + KERNEL_W < 32 else tl.int64
    bits = tl.zeros_like(top).to(word)
    for ky in tl.static_range(KERNEL_H):
        row = top + ky * dilation_h
        bits |= ((row >= 0) & (row < height)).to(word) << ky
    for kx in tl.static_range(KERNEL_W):
        column = left + kx * dilation_w
        bits |= ((column >= 0) & (column < width)).to(word) << (KERNEL_H + kx)
    return bits


@triton.jit  # type: ignore[untyped-decorator]
def _gather(
    x: tensor, corner: tensor, bits: tensor, column: tensor, valid: tensor,
    width: tensor, channels: tensor, dilation_h: tensor, dilation_w: tensor,
    KERNEL_H: constexpr, KERNEL_W: constexpr, BORDER: constexpr,
) -> tensor:  # fmt: skip
    """What `column` [BLOCK_K] reads for every pixel: a tile of x [BLOCK_M, BLOCK_K], zero outside the image.

    corner  [BLOCK_M] int64, where the window of the pixel begins in x; bits  see `_inside`
    """
    offset = column
    if KERNEL_H * KERNEL_W > 1:
        tap = column // channels
        ky = tap // KERNEL_W
        kx = tap % KERNEL_W
        offset = column + (ky * dilation_h * width + kx * dilation_w - tap) * channels
        if BORDER:
            seen = (bits[:, None] >> ky[None, :]) & (bits[:, None] >> (KERNEL_H + kx)[None, :])
            valid = valid & ((seen & 1) != 0)
    elif BORDER:
        valid = valid & (bits == 3)[:, None]
    return tl.load(x + (corner[:, None] + offset[None, :]), mask=valid, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _activate(z: tensor, ACTIVATION: constexpr) -> tensor:
    """Like torch's own, NaN included: a comparison with NaN is false and lets it through."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        z = tl.where(z < 0.0, 0.0, z)
    if ACTIVATION == "relu6":
        z = tl.where(z > 6.0, 6.0, z)
    if ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "hardswish":
        gate = z + 3.0
        gate = tl.where(gate < 0.0, 0.0, gate)
        z = z * tl.where(gate > 6.0, 6.0, gate) / 6.0
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    z: tensor, y: tensor, bias: tensor, residual: tensor, pixel: tensor, row: tensor,
    valid_pixel: tensor, valid_row: tensor, out_channels: tensor, ACTIVATION: constexpr,
) -> tensor:  # fmt: skip
    """The epilogue of one tile `z` [BLOCK_M, BLOCK_N] of sums, and the scatter to its output channels."""
    at = pixel.to(tl.int64)[:, None] * out_channels + row[None, :]
    valid = valid_pixel[:, None] & valid_row[None, :]
    if bias is not None:
        z += tl.load(bias + row, mask=valid_row, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        z += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(y + at, _activate(z, ACTIVATION).to(y.dtype.element_ty), mask=valid)


@triton.jit  # type: ignore[untyped-decorator]
def _extent(group: tensor, row_ptr: tensor, column_ptr: tensor, value_ptr: tensor) -> tensor:
    """A group's first row and how many, its first column and how many, its first value and a column's values."""
    first_row = tl.load(row_ptr + group)
    row_count = tl.load(row_ptr + group + 1) - first_row
    first_column = tl.load(column_ptr + group)
    column_count = tl.load(column_ptr + group + 1) - first_column
    start = tl.multiple_of(tl.load(value_ptr + group), 16)
    return first_row, row_count, first_column, column_count, start, tl.cdiv(row_count, 16) * 16


@triton.jit  # type: ignore[untyped-decorator]
def shuffled_block(
    x: tensor, rows: tensor, row_ptr: tensor, columns: tensor, column_ptr: tensor, values: tensor, value_ptr: tensor,
    bias: tensor, residual: tensor, y: tensor,
    pixels: tensor, groups: tensor, rows_per_group: tensor, columns_per_group: tensor,
    height: tensor, width: tensor, channels: tensor, out_height: tensor, out_width: tensor, out_channels: tensor,
    stride_h: tensor, stride_w: tensor, pad_h: tensor, pad_w: tensor, dilation_h: tensor, dilation_w: tensor,
    KERNEL_H: constexpr, KERNEL_W: constexpr, BORDER: constexpr, ACTIVATION: constexpr,
    PRECISION: constexpr, WIDEN: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
) -> tensor:  # fmt: skip
    """Tensors as in `shuffled_block_conv2d`; `bias` and `residual` may be None; one program id per tile."""
    slots = tl.cdiv(rows_per_group, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // slots % groups
    pixel = pid // (slots * groups) * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = pixel // (out_height * out_width)
    top = pixel // out_width % out_height * stride_h - pad_h
    left = pixel % out_width * stride_w - pad_w
    corner = sample.to(tl.int64) * (height * width * channels) + (top * width + left) * channels
    bits = pixel
    if BORDER:
        bits = _inside(top, left, height, width, dilation_h, dilation_w, KERNEL_H, KERNEL_W)
    first_row, row_count, first_column, column_count, start, lanes = _extent(group, row_ptr, column_ptr, value_ptr)
    for row0 in range(pid % slots * BLOCK_N, row_count, slots * BLOCK_N):
        lane = row0 + tl.arange(0, BLOCK_N)
        z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for column0 in range(0, column_count, BLOCK_K):
            k = column0 + tl.arange(0, BLOCK_K)
            column = tl.load(columns + first_column + k, mask=k < column_count, other=0)
            tile = _gather(
                x, corner, bits, column, (pixel < pixels)[:, None] & (k < column_count)[None, :], width, channels,
                dilation_h, dilation_w, KERNEL_H, KERNEL_W, BORDER,
            )  # fmt: skip
            inside = (k < column_count)[:, None] & (lane < lanes)[None, :]
            weight = tl.load(values + start + k[:, None] * lanes + lane[None, :], mask=inside, other=0.0)
            if WIDEN:
                tile = tile.to(tl.float32)
                weight = weight.to(tl.float32)
            z = tl.dot(tile, weight, z, input_precision=PRECISION)
        valid_row = lane < row_count
        row = tl.load(rows + first_row + lane, mask=valid_row, other=0)
        _store(z, y, bias, residual, pixel, row, pixel < pixels, valid_row, out_channels, ACTIVATION)


INTERPRETED = not isinstance(shuffled_block, triton.JITFunction)
CANDIDATES = (
    Tiles(64, 128, 32, 8), Tiles(64, 64, 32, 8), Tiles(64, 64, 32, 4), Tiles(128, 128, 32, 8), Tiles(128, 64, 32, 8),
    Tiles(64, 64, 64, 8), Tiles(64, 32, 32, 4), Tiles(32, 128, 32, 4), Tiles(32, 64, 32, 4), Tiles(16, 128, 32, 4),
)  # fmt: skip


def choose_tiles(rows_per_group: int) -> Tiles:
    """Tiles by rule: on an H200 few pixels won at ten of eleven shapes, for groups of 64 rows and of 128."""
    return Tiles(16, 128 if rows_per_group > 32 else max(16, triton.next_power_of_2(rows_per_group)), 32)


def launch(
    x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, residual: Tensor | None, y: Tensor, activation: str,
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    tiles: Tiles | str | None,
) -> None:  # fmt: skip
    """Write every packed row of `y`. Arguments are those of `shuffled_block_conv2d`, checked; nothing may be empty."""
    pixels, groups = y.shape[:3].numel(), packed[1].numel() - 1
    rows_per_group = triton.cdiv(packed[0].numel(), groups)
    sizes = (pixels, groups, rows_per_group, triton.cdiv(packed[2].numel(), groups), *x.shape[1:], *y.shape[1:])
    meta = {
        "KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "BORDER": any(padding), "ACTIVATION": activation,
        # The interpreter multiplies bfloat16 as if its bits were integers (Triton 3.8).
        "PRECISION": precision(kernel), "WIDEN": INTERPRETED and x.dtype == torch.bfloat16,
    }  # fmt: skip
    if tiles is None:
        tiles = choose_tiles(rows_per_group)
    run = _tuned if isinstance(tiles, str) else shuffled_block
    meta |= {} if isinstance(tiles, str) else config(tiles).all_kwargs()
    with torch.cuda.device_of(x):
        run[_grid(pixels, groups, rows_per_group)](
            x, *packed, bias, residual, y, *sizes, *stride, *padding, *dilation, **meta
        )


def precision(kernel: tuple[int, int] = (1, 1)) -> str:
    """How float32 may be multiplied: torch's own switches decide, that of cuDNN for windows, else that of products."""
    switch: Any = torch.backends.cuda.matmul if kernel == (1, 1) else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def _grid(pixels: int, groups: int, rows_per_group: int) -> Callable[[dict[str, Any]], tuple[int]]:
    return lambda meta: (triton.cdiv(pixels, meta["BLOCK_M"]) * groups * triton.cdiv(rows_per_group, meta["BLOCK_N"]),)


def config(tiles: Tiles) -> Any:
    """As Triton takes them."""
    sizes = {"BLOCK_M": tiles.pixels, "BLOCK_N": tiles.rows, "BLOCK_K": tiles.columns}
    return triton.Config(sizes, num_warps=tiles.warps, num_stages=tiles.stages)


def _bench(call: Callable[[], None], quantiles: tuple[float, ...]) -> Any:
    """The interpreter has no device to time on; there every candidate counts the same and the first one is taken."""
    if INTERPRETED:
        return [0.0 for _ in quantiles]
    return triton.testing.do_bench(call, quantiles=quantiles)


_tuned = triton.autotune(
    configs=[config(tiles) for tiles in CANDIDATES],
    key=["pixels", "groups", "rows_per_group", "columns_per_group", "channels", "out_channels"],
    do_bench=_bench,
)(shuffled_block)
