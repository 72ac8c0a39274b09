"""Memory of large intermediate results on a CPU, kept from call to call.

glibc returns what is larger than 32 MB to the system as soon as it is free, and often what lies at the heap's end. At
the next call those are new pages, which the system clears one by one, tens of thousands at batch 16.
GPUs have PyTorch's caching allocator, and ONNX Runtime has an arena; PyTorch has nothing of the kind on a CPU.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes that are worth it
LOOSE = 1.5  # a block may be this many times as large as what lies in it
OLD = 256  # tensors handed out since a block was used: it goes when another is made


class Memory:
    """Hands out tensors in blocks that are free again: nothing but this object holds their storage."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()
        self._given = 0

    def empty_strided(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty_strided`, on the CPU."""
        last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        n = (last + 1) * dtype.itemsize if all(size) else 0
        if n < SMALLEST:
            return torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        with self._lock:
            self._given += 1
            block = self._fitting(n) or self._new(n)
            block.given = self._given
            return torch.empty(0, dtype=dtype, device="cpu").set_(block.storage, 0, size, stride)

    def empty_like(self, x: Tensor) -> Tensor:
        """As `torch.empty_like`, with the strides of `x` whatever they are."""
        return self.empty_strided(x.shape, x.stride(), x.dtype)

    def _fitting(self, n: int) -> _Block | None:
        """The smallest free block for `n` bytes."""
        found = [b for b in self._blocks if n <= b.bytes <= LOOSE * n and not b.in_use()]
        return min(found, key=lambda b: b.bytes, default=None)

    def _new(self, n: int) -> _Block:
        self._blocks = [b for b in self._blocks if self._given - b.given < OLD]
        self._blocks.append(_Block(n))
        return self._blocks[-1]


class _Block:
    given = 0  # how many tensors had been handed out when this one was

    def __init__(self, n: int) -> None:
        self.bytes = n
        self.storage = torch.UntypedStorage(n, device="cpu")
        _in_huge_pages(self.storage.data_ptr(), n)
        self._untouched = self._state()

    def in_use(self) -> bool:
        """Whether somebody has a tensor in it, or its storage, or moved that: to share it with a process, say."""
        return self._state() != self._untouched

    def _state(self) -> tuple[int, int, int]:
        """Tensors hold the storage, Python's holders its wrapper, of which there is one."""
        storage = self.storage
        return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage), storage.data_ptr()


def _in_huge_pages(address: int, n: int) -> None:
    """Ask Linux for pages of 2 MB: fewer to clear, and fewer for the processor to look up. It may say no."""
    if (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is None:
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + n - first) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)


def give_memory(generated: ModuleType) -> bool:
    """What Inductor generated asks this for its intermediate results from now on; False where it does not ask."""
    if not hasattr(generated, "empty_strided_cpu") or not hasattr(torch._C, "_storage_Use_Count"):
        return False
    generated.empty_strided_cpu = Memory().empty_strided  # type: ignore[attr-defined]
    return True
