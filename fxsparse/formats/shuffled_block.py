"""Shuffled blocks: groups of rows that share one list of kept columns, each group a dense matrix.

A weight [O, I, kH, kW] is read as O rows of n = kH * kW * I columns, taps outermost. For groups g = 0 .. G-1:

    rows        int32 [sum R_g]        output channel of every packed row, group after group
    row_ptr     int32 [G + 1]          rows[row_ptr[g] : row_ptr[g + 1]] are the R_g rows of group g
    columns     int32 [sum K_g]        kept columns of every group, ascending
    column_ptr  int32 [G + 1]
    values      float [sum K_g * L_g]  group g is [K_g, L_g]
    value_ptr   int64 [G + 1]

The kernel has either in its vector lanes. With `lanes` "rows", L_g is R_g rounded up to 16, zeros in the rest, and
bfloat16 lies in pairs of columns, [K_g / 2, L_g, 2], K_g rounded up to be even. With "pixels", L_g is R_g: that is for
groups of few rows, down to one each, which are compressed sparse rows.

Every row is in one group; rows without a nonzero share the last, which has no columns. Every nonzero of the weight is
stored; so are zeros that share its block. The groups are found in the zeros alone: rows with equal columns first, then
those are merged while that makes the stored blocks cheaper. Sources: Chen et al., Coarsening the Granularity (ICML
2022), Regroup; DSB (NeurIPS 2022).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fxsparse.errors import InputError
from fxsparse.formats.grouping import COSTS, WIDTH, group_rows
from fxsparse.kernels.shared import LANES

ARRAYS = ("values", "value_ptr", "columns", "column_ptr", "rows", "row_ptr")  # in the order the operator takes them


@dataclass(frozen=True)
class ShuffledBlock:
    """A packed weight; see the module's text for the arrays. `shape` is the weight's own, [O, I, kH, kW] or [O, I].

    Raises InputError when the arrays do not fit each other: the kernels trust them.
    """

    values: Tensor
    value_ptr: Tensor
    columns: Tensor
    column_ptr: Tensor
    rows: Tensor
    row_ptr: Tensor
    shape: tuple[int, ...]
    lanes: str = "rows"

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise InputError("shuffled-block weight", expected="arrays that fit each other", got=problem,
                             do="Pack it again from the weight: the file or tensor was damaged.")  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arrays in the order the operator takes them."""
        return tuple(getattr(self, name) for name in ARRAYS)

    @property
    def groups(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def nse(self) -> int:
        """Stored elements: zeros inside blocks and lanes that round a group up included."""
        return self.values.numel()

    @property
    def work(self) -> int:
        """Multiply-adds per position, with what else a group's columns take in units of those: see `grouping`."""
        sizes, columns = self.row_ptr.diff().numpy(), self.column_ptr.diff().numpy()
        return int((COSTS[self.lanes](sizes) * columns).sum())

    @property
    def in_order(self) -> bool:
        """Whether every group's rows follow each other, so that its results are stored without a scatter."""
        ends = self.row_ptr[1:-1].long() - 1
        steps = self.rows[1:] - self.rows[:-1]
        steps[ends] = 1
        return bool((steps == 1).all())

    def __str__(self) -> str:
        rows = "in order" if self.in_order else "scattered"
        how = f"rows {rows}" if self.lanes == "rows" else "pixels in lanes"
        return f"{self.groups} row groups, {self.nse} stored elements, {how}"

    @property
    def row_groups(self) -> list[NDArray[np.int64]]:
        """Row numbers of every group."""
        ends = self.row_ptr.tolist()
        return [self.rows[a:b].numpy().astype(np.int64) for a, b in itertools.pairwise(ends)]


def pack(weight: Tensor, groups: Sequence[NDArray[np.int64]] | None = None, lanes: str = "rows") -> ShuffledBlock:
    """Pack the nonzeros of `weight` [O, I, kH, kW] or [O, I].

    Values keep the weight's dtype. NaN and infinities are nonzeros.

    groups  row numbers that share a block; None: they are found in the zeros
    Raises InputError on other ranks, and on groups that leave out a row with a nonzero.
    """
    if weight.dim() not in (2, 4):
        raise InputError("weight to pack", expected="[O, I] or [O, I, kH, kW]", got=f"shape {tuple(weight.shape)}",
                         do="Only convolutions over images and linear layers have this format.")  # fmt: skip
    flat = _as_rows(weight.detach().cpu())
    used = (flat != 0).numpy()
    groups = group_rows(used, lanes) if groups is None else groups
    if left_out := set(np.flatnonzero(used.any(1))).difference(*groups):
        raise InputError("groups of rows", expected="every row with a nonzero in one of them",
                         got=f"{len(left_out)} that are in none, the first is {min(left_out)}",
                         do="Leave groups out to have them found.")  # fmt: skip
    zero = np.setdiff1d(np.arange(len(flat)), np.concatenate([*groups, np.zeros(0, np.int64)]))
    groups = [*groups, zero] if len(zero) else groups
    parts = _pack_rows(flat, used, groups) if lanes == "pixels" else None
    parts = parts or [_pack_group(flat, rows, np.logical_or.reduce(used[rows]), lanes) for rows in groups]
    return ShuffledBlock(
        values=torch.cat([p[1].flatten() for p in parts]) if parts else flat.new_zeros(0),
        value_ptr=_pointers([p[1].numel() for p in parts], torch.int64),
        columns=torch.cat([p[0] for p in parts]).int() if parts else torch.zeros(0, dtype=torch.int32, device="cpu"),
        column_ptr=_pointers([len(p[0]) for p in parts], torch.int32),
        rows=torch.from_numpy(np.concatenate([*groups, np.zeros(0, np.int64)])).int(),
        row_ptr=_pointers([len(g) for g in groups], torch.int32),
        shape=tuple(weight.shape),
        lanes=lanes,
    )


def _pack_group(flat: Tensor, rows: NDArray[np.int64], used: NDArray[np.bool_], lanes: str) -> tuple[Tensor, Tensor]:
    """Columns [K] and values [K, L] of one group."""
    columns = torch.from_numpy(used.nonzero()[0])
    values = flat.new_zeros(len(columns), _width(len(rows), lanes))
    values[:, : len(rows)] = flat[torch.from_numpy(rows)][:, columns].t()
    return columns, _paired(values) if _in_pairs(flat.dtype, lanes) else values


def _pack_rows(
    flat: Tensor, used: NDArray[np.bool_], groups: Sequence[NDArray[np.int64]]
) -> list[tuple[Tensor, Tensor]] | None:
    """The same for all groups at once, where each is one row; None where one is not. There may be thousands."""
    if any(len(rows) != 1 for rows in groups):
        return None
    order = np.concatenate([*groups, np.zeros(0, np.int64)])
    row, column = (torch.from_numpy(index) for index in used[order].nonzero())
    values = flat[torch.from_numpy(order)[row], column]
    counts = used[order].sum(1).tolist()
    return list(zip(column.split(counts), values.split(counts), strict=True))


def _in_pairs(dtype: torch.dtype, lanes: str) -> bool:
    return dtype == torch.bfloat16 and lanes == "rows"


def _width(rows: int, lanes: str) -> int:
    """L of a group."""
    return -(-rows // WIDTH) * WIDTH if lanes == "rows" else rows


def _paired(values: Tensor) -> Tensor:
    """[K, L] as [K / 2, L, 2]: processors multiply two bfloat16 that lie together, and add."""
    even: Tensor = F.pad(values, (0, 0, 0, len(values) % 2))
    return even.view(-1, 2, values.shape[1]).transpose(1, 2)


def apart(values: Tensor, columns: int, lanes: str) -> Tensor:
    """The reverse: a group's values, flat, as [K, L]."""
    if not _in_pairs(values.dtype, lanes):
        return values.view(columns, -1)
    return values.view((columns + 1) // 2, -1, 2).transpose(1, 2).flatten(0, 1)[:columns]


def split(packed: ShuffledBlock) -> ShuffledBlock:
    """The same weight in groups of at most 16 rows, for kernels that take no more rows at once.

    Those read a part of every column's values, which lie beside each other only if it is all of them.
    """
    counts, taken, parts = packed.row_ptr.diff().tolist(), packed.column_ptr.diff().tolist(), []
    together = 2 if packed.values.dtype == torch.bfloat16 else 1
    for g, (rows, columns) in enumerate(zip(counts, taken, strict=True)):
        block = packed.values[int(packed.value_ptr[g]) : int(packed.value_ptr[g + 1])]
        block = block.view(-(-columns // together), _width(rows, "rows"), together)
        column = packed.columns[int(packed.column_ptr[g]) : int(packed.column_ptr[g + 1])]
        parts += [(min(WIDTH, rows - i), column, block[:, i : i + WIDTH].flatten()) for i in range(0, rows, WIDTH)]
    return replace(
        packed,
        values=torch.cat([p[2] for p in parts]) if parts else packed.values,
        value_ptr=_pointers([len(p[2]) for p in parts], torch.int64),
        columns=torch.cat([p[1] for p in parts]) if parts else packed.columns,
        column_ptr=_pointers([len(p[1]) for p in parts], torch.int32),
        row_ptr=_pointers([p[0] for p in parts], torch.int32),
    )


def _as_rows(weight: Tensor) -> Tensor:
    """[O, kH * kW * I]"""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1) if weight.dim() == 4 else weight


def _pointers(counts: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int64, device="cpu").cumsum(0).to(dtype)


def unpack(packed: ShuffledBlock) -> Tensor:
    """The weight, [O, I, kH, kW] or [O, I], in the dtype of the values."""
    rows, width = packed.shape[0], packed.shape[1]
    flat = packed.values.new_zeros(rows, int(np.prod(packed.shape[1:])))
    for g in range(packed.groups):
        row = packed.rows[int(packed.row_ptr[g]) : int(packed.row_ptr[g + 1])].long()
        column = packed.columns[int(packed.column_ptr[g]) : int(packed.column_ptr[g + 1])].long()
        block = packed.values[int(packed.value_ptr[g]) : int(packed.value_ptr[g + 1])]
        if len(column):
            flat[row[:, None], column[None]] = apart(block, len(column), packed.lanes)[:, : len(row)].t()
    if len(packed.shape) == 2:
        return flat
    return flat.view(rows, *packed.shape[2:], width).permute(0, 3, 1, 2).contiguous()


def _problem(p: ShuffledBlock) -> str:
    """What is wrong with the arrays; empty when nothing is."""
    if p.lanes not in LANES:
        return f"lanes that are {p.lanes!r}"
    counts = {name: getattr(p, name) for name in ("value_ptr", "column_ptr", "row_ptr")}
    for name, pointers in counts.items():
        if not len(pointers) or int(pointers[0]) != 0 or bool((pointers[1:] < pointers[:-1]).any()):
            return f"{name} that do not ascend from 0"
    if not len(p.value_ptr) == len(p.column_ptr) == len(p.row_ptr):
        return "pointers for different numbers of groups"
    ends = (int(p.value_ptr[-1]), int(p.column_ptr[-1]), int(p.row_ptr[-1]))
    if ends != (p.values.numel(), p.columns.numel(), p.rows.numel()):
        return "pointers that end elsewhere than their arrays"
    if not _within(p.columns, int(np.prod(p.shape[1:]))) or not _within(p.rows, p.shape[0]):
        return "a row or column outside of the weight"
    if len(p.rows) != p.shape[0] or len(p.rows.unique()) != len(p.rows):
        return "a row that is in two groups or in none"
    rows, columns = p.row_ptr.diff().long(), p.column_ptr.diff().long()
    padded = (rows + WIDTH - 1) // WIDTH * WIDTH if p.lanes == "rows" else rows
    columns += columns % 2 if _in_pairs(p.values.dtype, p.lanes) else 0
    if not torch.equal(p.value_ptr.diff(), columns * padded):
        return "blocks that are not rows x columns"
    inner = torch.ones(max(0, len(p.columns) - 1), dtype=torch.bool, device="cpu")
    starts = p.column_ptr[1:-1].long() - 1
    inner[starts[(starts >= 0) & (starts < len(inner))]] = False
    return "" if bool((p.columns.diff()[inner] > 0).all()) else "columns that do not ascend"


def _within(index: Tensor, size: int) -> bool:
    return not index.numel() or (int(index.min()) >= 0 and int(index.max()) < size)
