"""Which tensors were there, and whether they have changed since."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_VERSION = operator.attrgetter("_version")
_EXPIRED = torch.UntypedStorage._expired
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: NaN is equal to itself


class Seen:
    """Tensors as they were at one time.

    They are looked at before every call, so what can be is done by `map`, without a step of Python per tensor.

    silent  positions of those that PyTorch writes to without counting versions, as it does to the running statistics of
            a batch norm in training: their values are compared. One-dimensional
    """

    def __init__(self, tensors: Sequence[Tensor], silent: Collection[int] = ()) -> None:
        self._gone: list[object] = []
        self._refs = [weakref.ref(t, self._gone.append) for t in tensors]
        self._ids = list(map(id, tensors))
        # memory that was given back may be given to new storage, at the same address: so whether it was is asked too
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        self._pointers = [storage.cdata for storage in self._storages]
        self._traces = _traces(tensors)
        self._silent = list(silent)
        bits = [_bits(tensors[i]) for i in self._silent]
        self._live = [[b for b in bits if b.device == device] for device in {b.device for b in bits}]
        self._values = [b.clone() for b in bits]
        self._joined = list(map(torch.cat, self._live))

    def alive(self) -> bool:
        """Whether all of them are: the id of one that is gone may belong to a new tensor."""
        return not self._gone

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """The same objects."""
        return not self._gone and self._ids == list(map(id, tensors))

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """The same objects, not written to, nor given other storage."""
        traces = self.are(tensors) and not any(map(_EXPIRED, self._pointers)) and self._traces == _traces(tensors)
        return traces and all(map(torch.equal, self._joined, map(torch.cat, self._live)))

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of those that were replaced, written to or given other storage since."""
        now = zip(*_traces(tensors), strict=True)
        then = zip(self._refs, self._storages, zip(*self._traces, strict=True), tensors, now, strict=True)
        found = {i for i, (ref, s, old, t, new) in enumerate(then) if ref() is not t or s.expired() or old != new}
        values = zip(self._silent, self._values, strict=True)
        return sorted(found | {i for i, v in values if i not in found and not torch.equal(v, _bits(tensors[i]))})


def _traces(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Version counters and addresses."""
    return list(map(_VERSION, tensors)), list(map(Tensor.data_ptr, tensors))


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.detach().view(_INTEGER[tensor.element_size()])
