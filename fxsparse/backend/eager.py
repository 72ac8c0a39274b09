"""The graph as it is, run by PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from fxsparse.backend.cuda_graph import captured
from fxsparse.backend.target import Runnable, Target
from fxsparse.formats import KERNELS
from fxsparse.formats.gpu import placed
from fxsparse.kernels.build import compiler


class Eager(Target):
    """Any device, any shape, no compiler."""

    name = "eager"
    reads_shapes = False
    keeps_layouts = True

    def formats(self, device: torch.device) -> tuple[str, ...]:
        return KERNELS.get(device.type, ()) if device.type != "cpu" or compiler() else ()

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        return captured(self.lower_dynamic(gm), inputs)

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        return cast(Runnable, placed(gm))
