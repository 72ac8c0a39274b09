"""Which tensors were there, and whether they have changed since."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence

from torch import Tensor

_VERSION = operator.attrgetter("_version")


class Seen:
    """Tensors as they were at one time.

    They are looked at before every call, so what can be is done by `map`, without a step of Python per tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._gone: list[object] = []
        self._refs = [weakref.ref(t, self._gone.append) for t in tensors]
        self._ids = list(map(id, tensors))
        self._values = _values(tensors)

    def alive(self) -> bool:
        """Whether all of them are: the id of one that is gone may belong to a new tensor."""
        return not self._gone

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """The same objects."""
        return not self._gone and self._ids == list(map(id, tensors))

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """The same objects, not written to, nor given other storage."""
        return self.are(tensors) and self._values == _values(tensors)

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of those that were replaced, written to or given other storage since."""
        now = zip(*_values(tensors), strict=True)
        then = zip(self._refs, zip(*self._values, strict=True), tensors, now, strict=True)
        return [i for i, (ref, before, t, after) in enumerate(then) if ref() is not t or before != after]


def _values(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Version counters and addresses."""
    return list(map(_VERSION, tensors)), list(map(Tensor.data_ptr, tensors))
