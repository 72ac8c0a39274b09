"""Which rows of a sparse weight share a block: found in the zeros alone.

The cost of a group of R rows with K columns is c(R) * (K + s): starting a group is taken to be worth s columns. With
rows in vector lanes c is R filled up to 16, and s is 24. With pixels there c is R and, for every 8 rows, what reading
the pixels takes, and s is 2. That is a model; what is chosen is timed.
Rows with equal columns always go together. Up to 256 different rows are merged pair by pair while that lowers the cost.
More are first gathered greedily, a seed and the rows that share most columns with it, or left as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

WIDTH = 16  # lanes that the kernel fills up to
START_COLUMNS = 24  # with rows in lanes
LARGEST = 64  # rows of a group: larger ones are cut, so that several threads can share the work
_MERGED = 256
_GATHERED = (16, 32)  # rows per greedy group, the cheaper of these
_PIXELS_TILE, _PIXELS_READ = 8, 2.5  # rows with pixels in lanes that share what they read; that, in rows

Rows = NDArray[np.int64]
Bits = NDArray[np.bool_]
Numbers = NDArray[np.int64] | NDArray[np.float32]


def _rows_in_lanes(rows: Numbers | int) -> NDArray[np.float64]:
    return np.asarray((np.asarray(rows) + WIDTH - 1) // WIDTH * WIDTH, dtype=np.float64)


def _pixels_in_lanes(rows: Numbers | int) -> NDArray[np.float64]:
    rows = np.asarray(rows)
    return np.asarray(rows + (rows + _PIXELS_TILE - 1) // _PIXELS_TILE * _PIXELS_READ)


# What a column of a group of so many rows costs, in those of a dense weight.
COSTS: dict[str, Callable[[Numbers | int], NDArray[np.float64]]] = {"rows": _rows_in_lanes, "pixels": _pixels_in_lanes}
_STARTS = {"rows": START_COLUMNS, "pixels": 2}


def cost(rows: Numbers | int, columns: Numbers | int, lanes: str = "rows") -> NDArray[np.float64]:
    """Relative time of groups of `rows` x `columns`."""
    return np.asarray(COSTS[lanes](rows) * (np.asarray(columns) + _STARTS[lanes]))


def group_rows(used: Bits, lanes: str = "rows") -> list[Rows]:
    """Groups of row numbers, ascending; together all rows with a nonzero. `used` is [O, n].

    lanes  what the kernel has in its vector lanes: "rows" or "pixels"
    """
    alive = np.flatnonzero(used.any(1))
    if not len(alive):
        return []
    bits, member = _distinct(used[alive])
    groups = [alive[member == i] for i in range(len(bits))]
    if len(groups) > _MERGED:
        found = [_gather(groups, bits, size) for size in _GATHERED]
        if lanes == "pixels":  # in lanes of its own, a single row would leave most of them empty
            found.append((groups, bits))
        groups, bits = min(found, key=lambda candidate: _total(candidate[0], candidate[1], lanes))
    if len(groups) <= _MERGED:
        groups = _merge(groups, bits, lanes)
    cut = [piece for g in groups for piece in _cut(np.sort(g))]
    return sorted(cut, key=lambda g: int(g[0]))


def _distinct(used: Bits) -> tuple[Bits, NDArray[np.int64]]:
    """The different rows of `used`, and which of them each row is. Compared by their packed bytes."""
    packed = np.ascontiguousarray(np.packbits(used, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, member = np.unique(keys, return_index=True, return_inverse=True)
    return used[first], member.ravel()


def _total(groups: list[Rows], bits: Bits, lanes: str) -> float:
    return float(cost(np.array([len(g) for g in groups]), bits.sum(1), lanes).sum())


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


def _merge(groups: list[Rows], bits: Bits, lanes: str) -> list[Rows]:
    """Merge the pair that saves most, until no pair saves anything."""
    groups, bits = list(groups), bits.copy()
    sizes, floats = np.array([len(g) for g in groups]), bits.astype(np.float32)
    union = _unions(floats, floats)
    saved = _saved(sizes, union, np.diag(union), lanes)
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
        fresh = _saved(sizes, union, np.diag(union), lanes, a)
        saved[a], saved[:, a], saved[b], saved[:, b] = fresh, fresh, 0, 0
        saved[a, sizes == 0] = saved[sizes == 0, a] = saved[a, a] = 0
    return [g for g in groups if len(g)]


def _unions(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns of a[i] or b[j]."""
    return np.asarray(a.sum(1)[:, None] + b.sum(1)[None] - a @ b.T)


def _saved(
    sizes: NDArray[np.int64],
    union: NDArray[np.float32],
    own: NDArray[np.float32],
    lanes: str,
    row: int | None = None,
) -> NDArray[np.float64]:
    """Cost of two groups less that of the merged one, for all pairs or those with `row`."""
    alone = cost(sizes, own, lanes)
    if row is None:
        merged = cost(sizes[:, None] + sizes[None], union, lanes)
        return np.asarray(alone[:, None] + alone[None] - merged, dtype=np.float64)
    return np.asarray(alone[row] + alone - cost(sizes[row] + sizes, union[row], lanes), dtype=np.float64)


def _cut(rows: Rows) -> list[Rows]:
    """Pieces of at most LARGEST rows, whole lanes each but the last."""
    return [rows[i : i + LARGEST] for i in range(0, len(rows), LARGEST)]
