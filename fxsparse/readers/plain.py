"""Files that say nothing of pruning: tensors of zeros and ones are masks, anything else is a checkpoint with zeros."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fxsparse.errors import MaskError
from fxsparse.ir.masks import Masks, fit_names
from fxsparse.readers.checkpoint import Checkpoint
from fxsparse.readers.files import are_tensors

NAME = "zeros of a checkpoint"
MASKS = "masks"


class Zeros(Masks):
    """Masks of whatever has zeros in a checkpoint, which does not say what is a parameter: the model does."""

    def check(self, model: nn.Module) -> Masks:
        """As for any masks, but without those of the model's buffers."""
        buffers = dict(model.named_buffers(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        known = buffers.keys() | parameters.keys() | {name.removesuffix("_orig") for name in parameters}
        fitted = fit_names(self, known)
        return Masks({name: mask for name, mask in fitted.items() if name not in buffers}).check(model)


def recognizes(found: Mapping[str, object]) -> bool:
    """Whether it is a flat dict of tensors."""
    return are_tensors(found)


def read(found: Mapping[str, Tensor], where: str) -> Checkpoint:
    """Masks as they are, or those of the weights [O, I, ...] with at least one zero. Raises MaskError without any."""
    if all(_is_mask(tensor) for tensor in found.values()):
        return Checkpoint(MASKS, Masks(found))
    weights = {name: t for name, t in found.items() if t.is_floating_point() and t.dim() > 1}
    masks = Zeros({name: t != 0 for name, t in weights.items() if bool((t == 0).any())})
    if not masks:
        raise MaskError(where, expected="masks, or a weight with a zero", got=f"{len(found)} tensors, none with zeros",
                        do="A model whose channels were cut out, as by Torch-Pruning, needs no masks: compile it as it "
                        "is.")  # fmt: skip
    return Checkpoint(NAME, masks, dict(found))


def _is_mask(tensor: Tensor) -> bool:
    return not tensor.is_complex() and bool(((tensor == 0) | (tensor == 1)).all())
