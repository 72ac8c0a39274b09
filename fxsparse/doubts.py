"""What a call of compile() says, though it is seldom what was meant: each doubt is one sentence for a UserWarning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fxsparse.ir.masks import Masks, fit_names
from fxsparse.readers import Checkpoint


def warn_of_doubts(model: nn.Module, masks: Masks, given: Checkpoint, source: object) -> None:
    """For the caller's caller.

    masks   by the model's names
    given   where they are from; `source` is its path, if it has one
    """
    for doubt in (*_of_training(model), *_of_own_pruning(model, masks), *of_weights(model, given, source)):
        warnings.warn(doubt, UserWarning, stacklevel=3)


def _of_training(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if module.training and _differs_in_training(module):
            kind = type(module).__name__
            yield (
                f"the model is in training mode ({kind}{f' {name!r}' if name else ''}), and is compiled as it computes "
                "in evaluation mode. Call model.eval() first."
            )
            return


def _differs_in_training(module: nn.Module) -> bool:
    statistics = isinstance(module, (_BatchNorm, _InstanceNorm)) and module.track_running_stats
    return statistics or (isinstance(module, _DropoutNd) and module.p > 0)


def _of_own_pruning(model: nn.Module, masks: Masks) -> Iterator[str]:
    own = Masks.from_prune(model)
    count = sum(int((masks[name].to(mask.device) & ~mask).sum()) for name, mask in own.items() if name in masks)
    if count:
        yield (
            f"the masks keep {count} weights that torch.nn.utils.prune's own masks in the model hold at zero, and so "
            "does what is compiled. For weights that may grow again: prune.remove(module, name) first, then train "
            "under the new masks."
        )


def of_weights(model: nn.Module, given: Checkpoint, source: object) -> Iterator[str]:
    """A file's masks without its weights, where the model has others."""
    if given.weights and isinstance(source, (str, os.PathLike)) and _differ(model, given.masks, given.weights):
        path = repr(os.fspath(source))
        yield (
            f"masks are taken from {path}; its weights are not, and the model has others. To take both: "
            f"model.load_state_dict(fxsparse.read({path}).weights), then compile."
        )


def _differ(model: nn.Module, masks: Masks, weights: Mapping[str, Tensor]) -> bool:
    """Whether a value that the masks keep is another in the model, as far as names and shapes are alike."""
    own = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    own |= {name.removesuffix("_orig"): tensor for name, tensor in own.items() if name.endswith("_orig")}
    kept = fit_names(masks, own.keys())
    return any(
        name in own and own[name].shape == tensor.shape and _differs(own[name].detach(), tensor, kept.get(name))
        for name, tensor in fit_names(weights, own.keys()).items()
        if tensor.is_floating_point()
    )


def _differs(own: Tensor, stored: Tensor, mask: Tensor | None) -> bool:
    stored = stored.to(own)
    other = (own != stored) & ~(own.isnan() & stored.isnan())
    return bool((other if mask is None else other & mask.to(own.device)).any())
