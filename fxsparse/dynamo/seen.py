"""Which tensors were there, and whether they have changed since."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Seen:
    """Tensors as they were at one time. A weak reference tells that an id was not taken by a new tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [(weakref.ref(t), t._version, t.data_ptr()) for t in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """The same objects."""
        return all(ref() is t for (ref, _, _), t in zip(self.tensors, tensors, strict=True))

    def alive(self) -> bool:
        return all(ref() is not None for ref, _, _ in self.tensors)

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of those that were replaced, written to or given other storage since."""
        return [
            i
            for i, ((ref, version, pointer), t) in enumerate(zip(self.tensors, tensors, strict=True))
            if t._version != version or ref() is not t or t.data_ptr() != pointer
        ]
