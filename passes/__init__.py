"""What the compiler does, in order. A pass is a module with two functions:

    plan(gm, ctx) -> list[Decision]   only reads
    apply(gm, decision) -> None       carries out one accepted decision

The folder lives at the top of the checkout; its name is fxsparse.passes (a committed link).
"""

from __future__ import annotations

from types import ModuleType

if __name__ == "passes":
    raise ImportError("import fxsparse.passes: a second copy under the name 'passes' would register nothing.")

from fxsparse.passes import (
    canonicalize,
    choose_again,
    choose_formats,
    fold_batch_norm,
    fold_constants,
    fuse_epilogues,
    lower_formats,
    permute_channels,
    shrink_channels,
    write_means,
    write_sums,
)
from fxsparse.passes.context import Context
from fxsparse.passes.pipeline import name_of, run

STRUCTURE: tuple[ModuleType, ...] = (
    fold_batch_norm,  # batch norm into the convolution before it
    write_means,  # normalization over channels that are always 0, as products that can be cut
    fold_constants,  # channels that are constant become biases
    shrink_channels,  # channels nobody needs are cut out: smaller dense work, on every target
    write_sums,  # what is left of those products
)
STORAGE: tuple[ModuleType, ...] = (
    choose_formats,  # per weight: dense or a sparse format, by measured time
    permute_channels,  # channels are numbered so that packed weights write their row groups in order
    choose_again,  # what cannot, timed again
    lower_formats,  # packed weights and the formats' operators
    fuse_epilogues,  # residual sums and activations into them
)
PIPELINE: tuple[ModuleType, ...] = (
    canonicalize,  # one dialect: functional, inference batch norm, no dropout, one reader per weight
    *STRUCTURE,
    *STORAGE,
)

__all__ = ["PIPELINE", "STORAGE", "STRUCTURE", "Context", "name_of", "run"]
