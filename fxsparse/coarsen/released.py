"""Which blocks the released Regroup code takes of a cluster of rows, as it really behaves.

Two slips in that code decide the result, and the blocks published with it show them: it tests and counts column i of
the weight where column cc_i, the i-th fullest of the cluster, is meant, and it leaves a round at the first row that
still asks for more columns, without having counted the round for the rows after it.

    for i = 1 .. n-1:                    # nz_j starts as the number of columns that row j keeps
        for each row j of the cluster, in order:
            nz_j -= mask[j, i]
            if i <= t1 * nz_j: next i    # row j still asks for more columns
        the block is all rows x cc_1 .. cc_i; stop
A row that has let one i pass lets every later one pass, since i grows and nz_j falls. So row 0 is counted until it lets
an i pass, then row 1 from this i on, and so on: one running sum per row.
Source: VITA-Group/Structure-LTH, pruning_utils.regroup; t1 = 1.5, rows in tiles of 32, clusters of more than 16 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.coarsen.report import RowGroup


def released_blocks(
    mask: Tensor, found: Sequence[Tensor], row_tile: int, min_rows: int, ratio: float
) -> tuple[tuple[RowGroup, ...] | None, str]:
    """The blocks of every cluster, and what became of the rest; None, the mask stays as it is, when there is no block.

    mask   bool [O, n];  found  clusters of rows, int64
    A cluster of more than `row_tile` rows is cut into a whole number of tiles and a rest, whatever its size.
    """
    blocks: list[RowGroup] = []
    small = unending = 0
    for rows in found:
        columns = prefix(mask[rows], ratio)
        if columns is None:
            unending += len(rows)
        elif len(rows) > row_tile:
            whole = len(rows) // row_tile * row_tile
            blocks += [RowGroup(part, columns) for part in (rows[:whole], rows[whole:]) if len(part)]
        elif len(rows) > min_rows:
            blocks.append(RowGroup(rows, columns))
        else:
            small += len(rows)
    why = [f"{small} rows in clusters of at most {min_rows}"] * (small > 0)
    why += [f"{unending} rows in clusters whose rows ask for every column"] * (unending > 0)
    if not blocks:
        return None, f"kept as it was, unstructured: no block; {' and '.join(why)}"
    return tuple(blocks), f"{' and '.join(why)}: dropped whole" if why else ""


def prefix(mask: Tensor, ratio: float) -> Tensor | None:
    """The columns the released loop takes for a cluster, int64 ascending; None when it never ends. mask bool [R, n]"""
    columns = mask.shape[1]
    steps = torch.arange(columns, dtype=torch.float64)
    at = 1
    for row in mask:
        left = int(row.sum()) - row[at:].cumsum(0)  # nz_j after rounds at, at + 1, ...
        passed = (steps[at:] > ratio * left.double()).nonzero()
        if not len(passed):
            return None
        at += int(passed[0])
    order = mask.sum(0).argsort(descending=True, stable=True)
    return order[:at].sort().values
