"""What a target is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

COMPILING = threading.RLock()  # torch.export and Inductor have settings of the process: one thread at a time
# flattened inputs -> flattened outputs
Runnable = Callable[..., Sequence[Tensor]]


class Target:
    """Something that runs a graph. Subclasses live one to a file."""

    name: str
    reads_shapes = True  # `lower` and `lower_dynamic` read meta["val"]: else a graph from a file gets it on a GPU only
    # It runs what ATen's own operators say: formats are expanded, and layers timed in PyTorch say nothing about it.
    # With `formats="auto"` whole models are timed instead, with formats and without.
    standard_operators: bool = False
    memory_formats: tuple[str, ...] = ("contiguous", "channels_last")  # that make a difference to it
    keeps_layouts = False  # what it runs lies in memory as the graph's weights do: ours is tried in both formats too
    rivals: tuple[str, ...] = ("eager",)  # targets whose dense builds compete too
    runners: tuple[str, ...] = ()  # targets that do the work where it is none itself; the first always can
    one_for_all_sizes = False  # what it lowered runs any batch size, as fast
    refines: str = ""  # a target: what it lowered and won with is tried on this one too, where that is `worthwhile`

    def formats(self, device: torch.device) -> tuple[str, ...]:
        """Names of the sparse formats (`fxsparse.formats`) whose kernels it can run on `device`."""
        return ()

    def require(self) -> None:
        """Raise TargetError when this machine cannot run the target. By default it can."""

    def worthwhile(self, gm: fx.GraphModule, ms: float) -> bool:
        """For a target that `refines` another: whether to try `gm`, which takes `ms` on that one."""
        return True

    def __reduce__(self) -> tuple[object, ...]:
        """The one of its name, for copies and other processes: there it may be missing."""
        from fxsparse.backend import find_target

        return find_target, (self.name,)

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        """`gm` made ready for inputs of exactly these shapes. `gm` is not changed."""
        raise NotImplementedError

    def lower_dense(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        """The same for a dense build to compare with."""
        return self.lower(gm, inputs)

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        """`gm` made ready for any size of its symbolic dimensions. `gm` is not changed."""
        raise NotImplementedError
