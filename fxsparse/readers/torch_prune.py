"""State dicts of models under torch.nn.utils.prune: `conv.weight_orig` beside `conv.weight_mask`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.errors import MaskError
from fxsparse.ir.masks import Masks
from fxsparse.readers.checkpoint import Checkpoint
from fxsparse.readers.files import are_tensors

NAME = "torch.nn.utils.prune"
_MASK, _ORIGINAL = "_mask", "_orig"
_SPECTRAL = "_u"  # torch.nn.utils.spectral_norm has a `weight_orig` too


def recognizes(found: Mapping[str, object]) -> bool:
    """Whether there is a mask beside what it masks."""
    return are_tensors(found) and any(
        key.endswith(_MASK) and key.removesuffix(_MASK) + _ORIGINAL in found for key in found
    )


def read(found: Mapping[str, Tensor], where: str) -> Checkpoint:
    """Masks and masked weights under the names the model had before: `conv.weight`. MaskError without a mask."""
    originals = [key.removesuffix(_ORIGINAL) for key in found if key.endswith(_ORIGINAL)]
    names = [name for name in originals if name + _MASK in found or name + _SPECTRAL not in found]
    masks = Masks({name: _mask_of(name, found, where) for name in names})
    for name in names:
        _refuse_tied(name, found, where)
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


def _refuse_tied(name: str, found: Mapping[str, Tensor], where: str) -> None:
    """One parameter, pruned under one of its names: no model of the names before has two values for it."""
    original = found[name + _ORIGINAL]
    if original.dim() < 2 or bool((original == original.flatten()[:1]).all()):  # zeros and ones are alike by chance
        return
    for key, tensor in found.items():
        if key.endswith((_ORIGINAL, _MASK)) or tensor.shape != original.shape or not torch.equal(tensor, original):
            continue
        raise MaskError(
            f"{where}, {name!r}",
            expected="a weight that is pruned wherever it is read",
            got=f"{key!r}, the same values unpruned: a tied parameter",
            do="Compile the pruned model itself with masks=None, or untie the two before pruning.",
        )
