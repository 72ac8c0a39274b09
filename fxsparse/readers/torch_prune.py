"""State dicts of models under torch.nn.utils.prune: `conv.weight_orig` beside `conv.weight_mask`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxsparse.errors import MaskError
from fxsparse.ir.masks import Masks
from fxsparse.readers.checkpoint import Checkpoint
from fxsparse.readers.files import are_tensors

NAME = "torch.nn.utils.prune"
_MASK, _ORIGINAL = "_mask", "_orig"


def recognizes(found: Mapping[str, object]) -> bool:
    """Whether there is a mask beside what it masks."""
    return are_tensors(found) and any(
        key.endswith(_MASK) and key.removesuffix(_MASK) + _ORIGINAL in found for key in found
    )


def read(found: Mapping[str, Tensor], where: str) -> Checkpoint:
    """Masks and masked weights under the names the model had before: `conv.weight`. MaskError without a mask."""
    names = [key.removesuffix(_ORIGINAL) for key in found if key.endswith(_ORIGINAL)]
    masks = Masks({name: _mask_of(name, found, where) for name in names})
    halves = {name + end for name in names for end in (_MASK, _ORIGINAL)}
    weights = {key: tensor for key, tensor in found.items() if key not in halves}
    weights |= {name: found[name + _ORIGINAL].masked_fill(~mask, 0) for name, mask in masks.items()}
    return Checkpoint(NAME, masks, weights)


def _mask_of(name: str, found: Mapping[str, Tensor], where: str) -> Tensor:
    mask, original = found.get(name + _MASK), found[name + _ORIGINAL]
    if mask is None or mask.shape != original.shape:
        raise MaskError(f"{where}, {name + _ORIGINAL!r}", expected=f"its mask {name + _MASK!r}, of the same shape",
                        got="none" if mask is None else f"shapes {tuple(original.shape)} and {tuple(mask.shape)}",
                        do="Save the whole state dict of the pruned model.")  # fmt: skip
    return mask
