"""A packed layer as the operator that Inductor calls takes it: values, and one tensor for all else that never changes.

Between small layers the time goes into handing over arguments: with its output `shuffled_block` has fifteen, its twin
five. `layer` is int64: the numbers of `struct Layer` in kernels/cpu/shuffled_block.h, then value_ptr, columns,
column_ptr, rows, row_ptr and the bias, each with its own bits from a whole int64 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxsparse.kernels.shared import ACTIVATIONS, LANES

NUMBERS = 22  # in struct Layer
_NAMES = tuple(ACTIVATIONS)


def fold(
    packed: Sequence[Tensor],
    bias: Tensor | None,
    shape: Sequence[int],
    windows: Sequence[Sequence[int]],
    activation: str,
    lanes: str = "rows",
) -> Tensor:
    """`layer` for these arguments of `shuffled_block`, which are trusted.

    windows  stride, padding, dilation
    """
    values, *indices = packed
    words = [_words(array) for array in (*indices, bias) if array is not None]
    *places, end = np.cumsum([NUMBERS, *map(len, words)]).tolist()
    if bias is None:
        places.append(0)
    sizes = [*shape, 1, 1][:4]
    kind = (len(packed[-1]) - 1, _NAMES.index(activation), LANES.index(lanes), values.numel())
    numbers = [*sizes, len(shape), *(n for pair in windows for n in pair), *kind, *places, end]
    return torch.from_numpy(np.concatenate([np.array(numbers, np.int64), *words]))


def unfold(values: Tensor, layer: Tensor) -> tuple[list[Tensor], Tensor | None, list[Any]]:
    """The six arrays, the bias, and the last six arguments of `shuffled_block`."""
    numbers = layer[:NUMBERS].tolist()
    groups, activation, lanes, _, *places, _ = numbers[11:]

    def array(i: int, n: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return layer[places[i] :].view(dtype)[:n]

    value_ptr, column_ptr, row_ptr = array(0, groups + 1, torch.int64), array(2, groups + 1), array(4, groups + 1)
    columns, rows = array(1, int(column_ptr[-1])), array(3, int(row_ptr[-1]))
    bias = array(5, numbers[0], values.dtype) if places[5] else None
    windows = [numbers[i : i + 2] for i in (5, 7, 9)]
    rest = [numbers[: numbers[4]], *windows, _NAMES[activation], LANES[lanes]]
    return [values, value_ptr, columns, column_ptr, rows, row_ptr], bias, rest


def _words(array: Tensor) -> NDArray[np.int64]:
    """The array's bytes, filled up to whole int64."""
    raw = array.detach().contiguous().view(torch.uint8).numpy()
    return np.pad(raw, (0, -len(raw) % 8)).view(np.int64)
