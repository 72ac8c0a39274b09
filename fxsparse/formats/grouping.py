"""Which rows of a sparse weight share a block: found in the zeros alone.

The cost of a group of R rows with K columns is ceil(R / 16) * 16 * (K + 24): lanes are filled up to 16, or to 8 for a
group of at most 8 rows, and starting a group is taken to be worth 24 columns. That is a model; what is chosen is timed.
Rows with equal columns always go together. Up to 256 different rows are merged pair by pair while that lowers the cost.
More are first gathered greedily: a seed, and the rows that share most columns with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 16
START_COLUMNS = 24
LARGEST = 64  # rows of a group: larger ones are cut, so that several threads can share the work
_MERGED = 256
_GATHERED = (16, 32)  # rows per greedy group, the cheaper of these

Rows = NDArray[np.int64]
Bits = NDArray[np.bool_]
Numbers = NDArray[np.int64] | NDArray[np.float32]


def cost(rows: Numbers | int, columns: Numbers | int) -> NDArray[np.int64]:
    """Relative time of groups of `rows` x `columns`."""
    return np.asarray(lanes(rows) * (np.asarray(columns) + START_COLUMNS))


def lanes(rows: Numbers | int) -> NDArray[np.int64]:
    """Of the registers that groups of `rows` rows are summed in."""
    rows = np.asarray(rows)
    return np.asarray(np.where(rows <= LANES // 2, LANES // 2, (rows + LANES - 1) // LANES * LANES) * (rows > 0))


def group_rows(used: Bits) -> list[Rows]:
    """Groups of row numbers, ascending; together all rows with a nonzero. `used` is [O, n]."""
    alive = np.flatnonzero(used.any(1))
    if not len(alive):
        return []
    bits, member = _distinct(used[alive])
    groups = [alive[member == i] for i in range(len(bits))]
    if len(groups) > _MERGED:
        groups, bits = min((_gather(groups, bits, size) for size in _GATHERED), key=lambda found: _total(*found))
    groups = _merge(groups, bits)
    cut = [piece for g in groups for piece in _cut(np.sort(g))]
    return sorted(cut, key=lambda g: int(g[0]))


def _distinct(used: Bits) -> tuple[Bits, NDArray[np.int64]]:
    """The different rows of `used`, and which of them each row is. Compared by their packed bytes."""
    packed = np.ascontiguousarray(np.packbits(used, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, member = np.unique(keys, return_index=True, return_inverse=True)
    return used[first], member.ravel()


def _total(groups: list[Rows], bits: Bits) -> int:
    return int(cost(np.array([len(g) for g in groups]), bits.sum(1)).sum())


def _gather(groups: list[Rows], bits: Bits, size: int) -> tuple[list[Rows], Bits]:
    """Groups of `size` different rows: the fullest row left, and those that share most columns with it."""
    floats = bits.astype(np.float32)
    shared = floats @ floats.T
    left = np.ones(len(bits), dtype=bool)
    found: list[Rows] = []
    unions = []
    for seed in np.argsort(-bits.sum(1), kind="stable"):
        if left[seed]:
            order = np.argsort(-np.where(left, shared[seed], -1.0), kind="stable")[:size]
            order = order[left[order]]
            left[order] = False
            found.append(np.concatenate([groups[i] for i in order]))
            unions.append(bits[order].any(0))
    return found, np.array(unions)


def _merge(groups: list[Rows], bits: Bits) -> list[Rows]:
    """Merge the pair that saves most, until no pair saves anything."""
    groups, bits = list(groups), bits.copy()
    sizes, floats = np.array([len(g) for g in groups]), bits.astype(np.float32)
    union = _unions(floats, floats)
    saved = _saved(sizes, union, np.diag(union))
    np.fill_diagonal(saved, 0)
    while len(groups) > 1:
        a, b = divmod(int(saved.argmax()), len(sizes))
        if saved[a, b] <= 0:
            break
        groups[a], groups[b] = np.concatenate([groups[a], groups[b]]), groups[b][:0]
        sizes[a], sizes[b] = sizes[a] + sizes[b], 0
        floats[a] = np.maximum(floats[a], floats[b])
        floats[b] = 0
        union[a] = union[:, a] = _unions(floats[a : a + 1], floats)[0]
        union[b] = union[:, b] = floats.sum(1)
        fresh = _saved(sizes, union, np.diag(union), a)
        saved[a], saved[:, a], saved[b], saved[:, b] = fresh, fresh, 0, 0
        saved[a, sizes == 0] = saved[sizes == 0, a] = saved[a, a] = 0
    return [g for g in groups if len(g)]


def _unions(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns of a[i] or b[j]."""
    return np.asarray(a.sum(1)[:, None] + b.sum(1)[None] - a @ b.T)


def _saved(
    sizes: NDArray[np.int64], union: NDArray[np.float32], own: NDArray[np.float32], row: int | None = None
) -> NDArray[np.float64]:
    """Cost of two groups less that of the merged one, for all pairs or those with `row`."""
    alone = cost(sizes, own)
    if row is None:
        return np.asarray(alone[:, None] + alone[None] - cost(sizes[:, None] + sizes[None], union), dtype=np.float64)
    return np.asarray(alone[row] + alone - cost(sizes[row] + sizes, union[row]), dtype=np.float64)


def _cut(rows: Rows) -> list[Rows]:
    """Pieces of at most LARGEST rows, whole lanes each but the last."""
    return [rows[i : i + LARGEST] for i in range(0, len(rows), LARGEST)]
