"""Score the weights of a model beside it: copies take the place of its tensors, which are never written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxsparse.errors import InputError


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, gradients are recorded; after, what modules hold and torch's generators are as they were.

    Training mode is put back, and so are tensors that hooks leave in a module: torch.nn.utils.prune's `weight`, say.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    gpus = sorted({t.get_device() for t in (*model.parameters(), *model.buffers()) if t.is_cuda})
    with torch.random.fork_rng(gpus), torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        finally:
            for held, saved in before:
                held.clear()
                held.update(saved)


def variables(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, for autograd to take the gradient by, whether or not the parameters ask for theirs."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is: sums and products in half precision lose what the ranking is by."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def flat(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[numel] each, on the CPU so that every device ranks alike. Raises InputError on NaN and infinity."""
    for name, score in scores.items():
        wrong = score.numel() - int(score.isfinite().sum())
        if wrong:
            raise InputError(f"scores of {name!r}", expected="numbers that can be ranked",
                             got=f"{wrong} NaN or infinite of {score.numel()}",
                             do="Look at the weights and the inputs; deep networks overflow where nothing "
                                "keeps their activations small.")  # fmt: skip
    return {name: score.detach().reshape(-1).cpu() for name, score in scores.items()}
