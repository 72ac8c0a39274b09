"""Keep masked weights at exactly zero while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

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
    fitted = Masks(masks).check(model)

    def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fitted.apply_(model)

    with ExitStack() as undo:
        for name, mask in fitted.items():
            parameter: Any = parameters[name]  # Any: torch's register_hook has no types
            if parameter.requires_grad:
                undo.callback(parameter.register_hook(_zero_where(~mask)).remove)
        undo.callback(register_optimizer_step_post_hook(after_step).remove)
        fitted.apply_(model)
        try:
            yield
        finally:
            fitted.apply_(model)


def _zero_where(dropped: Tensor) -> Callable[[Tensor], Tensor]:
    # masked_fill, not a product: 0 * inf is NaN
    return lambda gradient: gradient.masked_fill(dropped.to(gradient.device), 0)
