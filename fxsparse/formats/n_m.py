"""N:M sparsity: of every M neighboring columns of a row at most N hold a weight. 2:4 is what GPUs multiply directly.

A weight [O, I], I a multiple of M, is stored in groups of 16 rows, q = 0 .. I/M - 1 counting M columns at a time:

    values  the weight's dtype [ceil(O/16), I/M, N, 16]   N values of every row, zeros where it has fewer
    codes   int32 [ceil(O/16), ceil(I/M/P), 16]           columns of the values, log2(M) bits each, low bits first:
                                                          those of P = 32 // (N log2(M)) neighboring q in one number

Columns of one row and q ascend. Rows past O are zeros with codes 0, 1, .. N - 1. M is a power of two, so a code cannot
point outside of its M columns. A weight with fewer zeros than the pattern asks for is refused, never changed.
Source of 2:4: Mishra et al., Accelerating Sparse Deep Neural Networks (2021); codes by row are our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxsparse.errors import InputError

ROWS = 16  # of a group
SIZES = (2, 4, 8, 16)  # M
PATTERNS = ((1, 4), (1, 2), (2, 4), (4, 8))  # that are looked for, the fewest weights first


@dataclass(frozen=True)
class NM:
    """A packed weight; see the module's text for the arrays. `shape` is the weight's own, [O, I].

    Raises InputError when the arrays do not fit each other: the kernels trust them.
    """

    values: Tensor
    codes: Tensor
    shape: tuple[int, int]
    n: int
    m: int

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)
        problem = _problem(self)
        if problem:
            raise InputError(f"{self.n}:{self.m} weight", expected="arrays that fit each other", got=problem,
                             do="Pack it again from the weight: the file or tensor was damaged.")  # fmt: skip

    @property
    def nse(self) -> int:
        """Stored elements: rows that fill up the last 16, and zeros of groups with fewer weights, included."""
        return self.values.numel()

    @property
    def work(self) -> int:
        """Its time is that of reading it."""
        return self.nse

    @property
    def row_groups(self) -> list[NDArray[np.int64]]:
        """All rows in one group: they are stored in order, whatever the order."""
        return [np.arange(self.shape[0])]

    def __str__(self) -> str:
        return f"{self.n}:{self.m}, {self.nse} stored elements"


def check_pattern(n: int, m: int) -> None:
    """Raises InputError unless M is 2, 4, 8 or 16 and 0 < N < M."""
    whole = all(isinstance(k, int) and not isinstance(k, bool) for k in (n, m))
    if not whole or m not in SIZES or not 0 < n < m:
        expected = f"N:M with 0 < N < M and M one of {', '.join(map(str, SIZES))}"
        raise InputError(f"pattern {n}:{m}", expected=expected, got=f"N {n!r} and M {m!r}",
                         do="2:4 is the pattern of GPUs, and of the CPU kernel.")  # fmt: skip


def misfits(mask: Tensor, n: int, m: int) -> int:
    """How many groups of M columns keep more than N. `mask` is [O, I, ...], True = kept; groups along I, tap by tap.

    Raises InputError when I is not a multiple of M: such a weight has no N:M form.
    """
    check_pattern(n, m)
    if mask.dim() < 2 or mask.shape[1] % m:
        raise InputError("mask", expected=f"[O, I] or [O, I, ...] with I a multiple of {m}",
                         got=f"shape {tuple(mask.shape)}", do=f"Leave such a weight out of {n}:{m}.")  # fmt: skip
    groups = mask.unflatten(1, (mask.shape[1] // m, m))
    return int((groups.sum(2) > n).sum())


def recognize(mask: Tensor) -> tuple[int, int] | None:
    """The first of PATTERNS that a mask [O, I, ...] keeps to, found in the mask alone; None when it keeps to none."""
    fitting = ((n, m) for n, m in PATTERNS if mask.dim() >= 2 and mask.shape[1] % m == 0)
    return next(((n, m) for n, m in fitting if misfits(mask, n, m) == 0), None)


def pack(weight: Tensor, n: int, m: int) -> NM:
    """Pack the nonzeros of `weight` [O, I]. Values keep its dtype; NaN and infinities are nonzeros.

    Raises InputError on other ranks, on I that M does not divide, on a group of M columns with more than N nonzeros.
    """
    if weight.dim() != 2:
        raise InputError("weight to pack", expected="[O, I]", got=f"shape {tuple(weight.shape)}",
                         do="Only linear layers are stored as N:M.")  # fmt: skip
    weight = weight.detach().cpu()
    if wrong := misfits(weight != 0, n, m):
        raise InputError("weight to pack", expected=f"at most {n} nonzeros in every {m} columns",
                         got=f"{wrong} of {weight.numel() // m} groups with more",
                         do=f"fxsparse.coarsen.n_m(weights, masks, n={n}, m={m}) makes such a mask.")  # fmt: skip
    groups = -(-len(weight) // ROWS)
    padded = torch.cat([weight, weight.new_zeros(groups * ROWS - len(weight), weight.shape[1])])
    by_group = padded.reshape(groups, ROWS, weight.shape[1] // m, m)
    stored = _fill(by_group != 0, n)
    columns = stored.flatten().nonzero().remainder(m).view(*by_group.shape[:3], n)
    values = by_group[stored].view(columns.shape).permute(0, 2, 3, 1).contiguous()
    return NM(values, _codes(columns, m), (weight.shape[0], weight.shape[1]), n, m)


def _fill(used: Tensor, n: int) -> Tensor:
    """Exactly N of every M, bool [..., M]: those used, and the first of the others."""
    stored, missing = used.clone(), n - used.sum(-1)
    for column in range(used.shape[-1]):
        taken = (missing > 0) & ~used[..., column]
        stored[..., column] |= taken
        missing -= taken.to(missing.dtype)
    return stored


def _layout(n: int, m: int) -> tuple[int, int]:
    """Bits of one code, and groups of M columns whose codes share a number."""
    bits = m.bit_length() - 1
    return bits, 32 // (n * bits)


def _codes(columns: Tensor, m: int) -> Tensor:
    """int32 [G, ceil(Q/P), 16] of columns int64 [G, 16, Q, N]."""
    groups, rows, count, n = columns.shape
    bits, together = _layout(n, m)
    shifts = bits * torch.arange(n, device="cpu")
    of_group = torch.nn.functional.pad((columns << shifts).sum(-1), (0, -count % together))
    shifts = n * bits * torch.arange(together, device="cpu")
    numbers = (of_group.view(groups, rows, -1, together) << shifts).sum(-1)
    signed = numbers - ((numbers >> 31) << 32)  # the same 32 bits as int32 reads them
    return signed.permute(0, 2, 1).int().contiguous()


def columns_of(packed: NM) -> Tensor:
    """Which of its M columns every value is in: int64 [G, Q, N, 16], as `values` are."""
    bits, together = _layout(packed.n, packed.m)
    groups, _, rows = packed.codes.shape
    shifts = (bits * torch.arange(together * packed.n, device=packed.codes.device)).view(together, packed.n, 1)
    columns = (packed.codes.long()[:, :, None, None] >> shifts) & (packed.m - 1)
    return columns.view(groups, -1, packed.n, rows)[:, : packed.shape[1] // packed.m]


def unpack(packed: NM) -> Tensor:
    """The weight [O, I] in the dtype of the values, exactly."""
    groups, count, _, rows = packed.values.shape
    weight = packed.values.new_zeros(groups, count, packed.m, rows)
    weight.scatter_(2, columns_of(packed), packed.values)
    return weight.permute(0, 3, 1, 2).reshape(groups * rows, packed.shape[1])[: packed.shape[0]].contiguous()


def _problem(p: NM) -> str:
    """What is wrong with the arrays; empty when nothing is."""
    if len(p.shape) != 2 or min(p.shape) < 1 or p.shape[1] % p.m:
        return f"a weight of shape {tuple(p.shape)}"
    groups, count, together = -(-p.shape[0] // ROWS), p.shape[1] // p.m, _layout(p.n, p.m)[1]
    if tuple(p.values.shape) != (groups, count, p.n, ROWS):
        return f"values of shape {tuple(p.values.shape)} for a weight of shape {tuple(p.shape)}"
    if tuple(p.codes.shape) != (groups, -(-count // together), ROWS) or p.codes.dtype != torch.int32:
        return f"codes of shape {tuple(p.codes.shape)} and {p.codes.dtype}"
    return "" if bool((columns_of(p).diff(dim=2) > 0).all()) else "columns that do not ascend"
