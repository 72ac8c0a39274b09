"""Maps of data movement without the dimensions that pass through.

Most movements leave most dimensions as they are: a permutation of heads takes every token to itself. Along such a
dimension one position says what happens at all of them, and a map of a hundred tokens is a hundred times as large as
what there is to know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lines:
    """A map at the first position along dimensions that pass through.

    through  output dimension -> the same dimension of each source
    index    the map [output shape, 1 where it passes through]: flat position in the concatenated sources, which are
             cut likewise; -1 for padding
    shapes   of the sources, cut likewise
    """

    through: dict[int, list[int]]
    index: Tensor
    shapes: list[list[int]]

    def dims(self, source: int) -> list[int]:
        """Dimensions of a source that pass through."""
        return [dims[source] for dims in self.through.values()]

    def of_source(self, source: int) -> Tensor:
        """Bool of the shape of `index`: what comes from there."""
        begin = sum(self.sizes[:source])
        return (self.index >= begin) & (self.index < begin + self.sizes[source])

    @property
    def sizes(self) -> list[int]:
        """Elements of the sources."""
        return [math.prod(shape) for shape in self.shapes]


def lines_of(index: Tensor, shapes: Sequence[Sequence[int]]) -> Lines:
    """`index` [output shape], flat positions in the concatenated tensors of `shapes`, -1 for padding."""
    through: dict[int, list[int]] = {}
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    for dim, size in enumerate(index.shape):
        if size > 1 and (same := _same_dimension(index, dim, shapes, ends)) is not None:
            through[dim] = same
    for dim in through:
        index = index.narrow(dim, 0, 1)
    small = [
        [1 if d in {dims[i] for dims in through.values()} else size for d, size in enumerate(shape)]
        for i, shape in enumerate(shapes)
    ]
    return Lines(through, _cut(index.long(), shapes, small), small)


def _same_dimension(index: Tensor, dim: int, shapes: Sequence[Sequence[int]], ends: Sequence[int]) -> list[int] | None:
    """The dimension of each source that `dim` of the output runs along, position by position; None if there is none."""
    first = index.narrow(dim, 0, 1)
    inside = first >= 0
    if not inside.any():
        return None
    step = int((index.narrow(dim, 1, 1) - first)[inside].flatten()[0])
    counts = torch.arange(index.shape[dim], dtype=index.dtype, device=index.device)
    counts = counts.view([-1 if d == dim else 1 for d in range(index.dim())])
    if step <= 0 or not torch.equal(index, torch.where(inside, first + counts * step, -1).to(index.dtype)):
        return None
    found = []
    for i, shape in enumerate(shapes):
        strides = _strides(shape)
        fits = [d for d, size in enumerate(shape) if size == index.shape[dim] and strides[d] == step and size > 1]
        begin = ends[i] - math.prod(shape)
        own = first[inside & (first >= begin) & (first < ends[i])] - begin
        if not fits or bool((own // step % index.shape[dim]).any()):
            return None
        found.append(fits[0])
    return found


def _cut(index: Tensor, shapes: Sequence[Sequence[int]], small: Sequence[Sequence[int]]) -> Tensor:
    """Positions in the tensors of `shapes` as positions in those of `small`."""
    new, begin, small_begin = torch.full_like(index, -1), 0, 0
    for shape, cut in zip(shapes, small, strict=True):
        if 0 in shape:
            continue
        end = begin + math.prod(shape)
        own = (index >= begin) & (index < end)
        place = torch.full_like(index, small_begin)
        for size, stride, kept, new_stride in zip(shape, _strides(shape), cut, _strides(cut), strict=True):
            if kept == size:
                place += (index - begin) // stride % size * new_stride
        new = torch.where(own, place, new)
        begin, small_begin = end, small_begin + math.prod(cut)
    return new


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]
