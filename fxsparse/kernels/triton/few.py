"""The Triton kernel of the shuffled block format for linear layers of few tokens, as decoders take their steps.

    y[part, token, rows[r]] = sum_k values[k, r] * x[token, columns[k]]  over the columns k of a part

What takes time is to read the values once. A program owns BLOCK_N rows of one group, TOKENS tokens and one part of the
group's columns: groups alone would leave most of a GPU idle. Whoever sums the parts adds what follows to that.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr, tensor

from fxsparse.kernels.triton import FEW_COLUMNS, FEW_ROWS
from fxsparse.kernels.triton.shuffled_block import INTERPRETED, _extent

__all__ = ["INTERPRETED", "launch"]
TOKENS = 4  # at most in a program: a token more is as many registers again


@triton.jit  # type: ignore[untyped-decorator]
def few(
    x: tensor, rows: tensor, row_ptr: tensor, columns: tensor, column_ptr: tensor, values: tensor, value_ptr: tensor,
    y: tensor, tokens: tensor, features: tensor, out_features: tensor, groups: tensor, parts: tensor, slots: tensor,
    TOKENS: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
) -> tensor:  # fmt: skip
    """Tensors as in `shuffled_block_few`; one program id per tile."""
    pid = tl.program_id(0)
    slot = pid % slots
    part = pid // slots % parts
    token = (pid // (slots * parts * groups) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    first_row, row_count, first_column, column_count, start, lanes = _extent(
        pid // (slots * parts) % groups, row_ptr, column_ptr, value_ptr
    )
    share = tl.cdiv(tl.cdiv(column_count, BLOCK_K), parts) * BLOCK_K
    begin = part * share
    end = min(begin + share, column_count)
    for row0 in range(slot * BLOCK_N, row_count, slots * BLOCK_N):
        lane = row0 + tl.arange(0, BLOCK_N)
        z = tl.zeros((TOKENS, BLOCK_K, BLOCK_N), dtype=tl.float32)
        stored = values + start + (begin + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None] * lanes + lane[None, :]
        for column0 in tl.range(begin, end, BLOCK_K, num_stages=3):
            k = column0 + tl.arange(0, BLOCK_K)
            column = tl.load(columns + first_column + k, mask=k < end, other=0)
            read = (token < tokens)[:, None] & (k < end)[None, :]
            tile = tl.load(x + token[:, None] * features + column[None, :], mask=read, other=0.0).to(tl.float32)
            weight = tl.load(stored, mask=(k < end)[:, None] & (lane < lanes)[None, :], other=0.0)
            stored += BLOCK_K * lanes
            z += tile[:, :, None] * weight.to(tl.float32)[None, :, :]
        row = tl.load(rows + first_row + lane, mask=lane < row_count, other=0)
        written = (part * tokens + token)[:, None] * out_features + row[None, :]
        tl.store(y + written, tl.sum(z, axis=1), mask=(token < tokens)[:, None] & (lane < row_count)[None, :])


def launch(x: Tensor, packed: tuple[Tensor, ...], y: Tensor) -> None:
    """Write every packed row of y [parts, tokens, O] from x [tokens, I]; checked, nothing is empty."""
    parts, tokens, out_features = y.shape
    groups = packed[1].numel() - 1
    slots = triton.cdiv(triton.cdiv(packed[0].numel(), groups), FEW_ROWS)
    together = min(TOKENS, triton.next_power_of_2(tokens))
    meta: dict[str, Any] = {"TOKENS": together, "BLOCK_N": FEW_ROWS, "BLOCK_K": FEW_COLUMNS, "num_warps": 4}
    grid = (triton.cdiv(tokens, together) * groups * parts * slots,)
    with torch.cuda.device_of(x):
        few[grid](x, *packed, y, tokens, x.shape[1], out_features, groups, parts, slots, **meta)
