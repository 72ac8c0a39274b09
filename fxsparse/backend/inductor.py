"""torch._inductor, called directly: no dynamo and no guards at run time, weights frozen into the code.

`freezing` packs weights for oneDNN and folds layouts. It only works on a module that owns its weights: through
`torch.compile(model, options={"freezing": True})` it silently does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from fxsparse.backend.target import Runnable, Target
from fxsparse.errors import TargetError
from fxsparse.ir.graph import flat
from fxsparse.kernels.build import compiler, compilers


class Inductor(Target):
    """Generated C++ and oneDNN on a CPU; Triton, cuDNN and cuBLAS on a GPU."""

    name = "inductor"

    def require(self) -> None:
        if compiler() is None:
            raise TargetError(
                "target 'inductor'",
                expected=f"a C++ compiler ({' or '.join(compilers())}) on PATH, which Inductor calls",
                got="none",
                do="Install one (Debian: apt-get install g++), set CXX, or pass target='eager'.",
            )

    def formats(self, device: torch.device) -> tuple[str, ...]:
        return ("shuffled_block", "n_m") if device.type == "cpu" else ()

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        import torch._inductor

        module = flat(gm)
        for node in module.graph.nodes:  # symbolic shapes of the capture mean nothing to this trace
            node.meta.pop("val", None)
            node.meta.pop("example_value", None)
        with torch.no_grad():
            return cast(Runnable, torch._inductor.compile(module, list(inputs), options=_options(gm)))

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        import torch._inductor

        module = flat(gm)
        fake = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
        patches = {"config_patches": _options(gm)}
        with torch.no_grad():
            return cast(
                Runnable,
                torch._inductor.standalone_compile(module, fake, dynamic_shapes="from_graph", options=patches),
            )


def _options(gm: fx.GraphModule) -> dict[str, Any]:
    """Freezing, except in float64: it packs convolution weights for oneDNN, which has no float64."""
    return {"freezing": not any(b.dtype == torch.float64 for b in gm.buffers())}
