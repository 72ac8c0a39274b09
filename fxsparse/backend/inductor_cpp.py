"""Inductor with the calls between kernels in C++ too: in a small model Python costs a good part of the time.

In a large one as well: weights that pass through the caches leave nothing of Python's own code and objects there.

`target="inductor"` tries it by itself with the builds that won, where there is much to gain.
Source: torch._inductor.config.cpp_wrapper.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxsparse.analysis.reasons import is_layer
from fxsparse.backend.inductor import Inductor
from fxsparse.ir.graph import is_ours, on_gpu

CALL_US = 30.0  # what calling a dense layer's kernel costs in Python and not in C++; our operators gain next to nothing
COLD_CALL_US = 100.0  # of any layer, with what is around it, when the caches hold weights: ViT-B/16 on a Zen 4
FILLING = 32 << 20  # bytes of weights from which they do
WORTH = 0.03  # the part of the time that is worth a longer compilation
FEWEST_CALLS = 12  # models of a few layers take microseconds either way


class InductorCpp(Inductor):
    """The same kernels on a CPU; compiling takes seconds longer."""

    name = "inductor_cpp"
    rivals = ("eager", "inductor")
    refines = "inductor"

    def worthwhile(self, gm: fx.GraphModule, ms: float) -> bool:
        layers, ours = (sum(n.op == "call_function" and of(n) for n in gm.graph.nodes) for of in (is_layer, is_ours))
        calls, call_us = layers, CALL_US
        if sum(weight.nbytes for weight in gm.buffers()) > FILLING:
            calls, call_us = layers + ours, COLD_CALL_US
        return not on_gpu(gm) and calls >= FEWEST_CALLS and calls * call_us / 1e3 >= WORTH * ms

    def options(self, gm: fx.GraphModule) -> dict[str, Any]:
        return super().options(gm) | {"cpp_wrapper": True}
