"""What a target is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

# flattened inputs -> flattened outputs
Runnable = Callable[..., Sequence[Tensor]]


class Target:
    """Something that runs a graph. Subclasses live one to a file."""

    name: str
    reads_shapes = True  # `lower` and `lower_dynamic` read meta["val"], which a graph from a file gets only then

    def formats(self, device: torch.device) -> tuple[str, ...]:
        """Names of the sparse formats (`fxsparse.formats`) whose kernels it can run on `device`."""
        return ()

    def require(self) -> None:
        """Raise TargetError when this machine cannot run the target. By default it can."""

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        """`gm` made ready for inputs of exactly these shapes. `gm` is not changed."""
        raise NotImplementedError

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        """`gm` made ready for any size of its symbolic dimensions. `gm` is not changed."""
        raise NotImplementedError
