"""Mask files of Microsoft NNI: {module name: {"weight": mask, "bias": mask}}, saved by torch.save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxsparse.errors import MaskError
from fxsparse.ir.masks import Masks
from fxsparse.readers.checkpoint import Checkpoint

NAME = "NNI masks"
_ACTIVATIONS = ("_input_", "_output_")  # NNI 3 also masks what a module reads and writes, under such names


def recognizes(found: Mapping[str, object]) -> bool:
    """Whether it is a dict of dicts of tensors."""
    return all(
        isinstance(module, Mapping) and all(v is None or isinstance(v, Tensor) for v in module.values())
        for module in found.values()
    )


def read(found: Mapping[str, Mapping[str, Any]], where: str) -> Checkpoint:
    """Masks by parameter name. Raises MaskError on masks of activations that mask something: they are no weights."""
    masks = {}
    for module, of_module in found.items():
        for target, mask in of_module.items():
            if mask is None:
                continue
            if not target.startswith(_ACTIVATIONS):
                masks[f"{module}.{target}"] = mask
            elif not bool((mask != 0).all()):
                raise MaskError(
                    f"{where}, {module!r}", expected="masks of weights and biases",
                    got=f"one of its activations, {target!r}",
                    do="Export the masks of weights alone, or prune the weights that write them.",
                )  # fmt: skip
    return Checkpoint(NAME, Masks(masks))
