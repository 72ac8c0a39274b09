"""What the compiler does, in order. A pass is a module with two functions:

    plan(gm, ctx) -> list[Decision]   only reads
    apply(gm, decision) -> None       carries out one accepted decision

The folder lives at the top of the checkout; its name is fxsparse.passes (a committed link).
"""

from __future__ import annotations

from types import ModuleType

if __name__ == "passes":
    raise ImportError("import fxsparse.passes: a second copy under the name 'passes' would register nothing.")

from fxsparse.passes import canonicalize, fold_batch_norm, fold_constants, shrink_channels
from fxsparse.passes.context import Context
from fxsparse.passes.pipeline import name_of, run

PIPELINE: tuple[ModuleType, ...] = (
    canonicalize,  # one dialect: functional, inference batch norm, no dropout, one reader per weight
    fold_batch_norm,  # batch norm into the convolution before it
    fold_constants,  # channels that are constant become biases
    shrink_channels,  # channels nobody needs are cut out: smaller dense work, on every target
)

__all__ = ["PIPELINE", "Context", "name_of", "run"]
