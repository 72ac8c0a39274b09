"""The graph as it is, run by PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from fxsparse.backend.target import Runnable, Target
from fxsparse.ir.graph import flat


class Eager(Target):
    """Any device, any shape, no compiler."""

    name = "eager"

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        return self.lower_dynamic(gm)

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        return cast(Runnable, flat(gm))
