"""Keep masked weights at exactly zero while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxsparse.ir.masks import Masks


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, whatever torch optimizers do to `model`, its masked weights are exactly zero after every step.

    Twice over: gradients of masked weights are zeroed as they arrive, before DistributedDataParallel averages them
    and before gradient norms are taken; and after every step of any torch.optim.Optimizer the weights are masked
    again, because momentum from before the mask still moves them. Weights are also masked on entry and on exit, so
    they are zero after the block even when something else than a torch optimizer wrote to them.
    The model's parameters must stay the same objects (load_state_dict and `.to(device)` keep them). Raises MaskError
    when a mask does not fit the model.
    """
    parameters = dict(model.named_parameters())
    weights = [_Masked(parameters[name], mask) for name, mask in Masks(masks).check(model).items()]

    def apply(*_: object) -> None:
        for weight in weights:
            weight.apply()

    with ExitStack() as undo:
        for weight in weights:
            if weight.parameter.requires_grad:
                undo.callback(weight.parameter.register_hook(weight.zeroed).remove)
        undo.callback(register_optimizer_step_post_hook(apply).remove)
        apply()
        try:
            yield
        finally:
            apply()


class _Masked:
    """A parameter and where it is zero, once on its device."""

    def __init__(self, parameter: Any, mask: Tensor) -> None:  # Any: torch's register_hook has no types
        self.parameter, self.dropped = parameter, ~mask

    def apply(self) -> None:
        self.parameter.detach().masked_fill_(self._dropped_on(self.parameter.device), 0)

    def zeroed(self, gradient: Tensor) -> Tensor:
        # masked_fill, not a product: 0 * inf is NaN
        return gradient.masked_fill(self._dropped_on(gradient.device), 0)

    def _dropped_on(self, device: torch.device) -> Tensor:
        self.dropped = self.dropped.to(device)  # the model may be moved meanwhile
        return self.dropped
