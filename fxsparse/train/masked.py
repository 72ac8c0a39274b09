"""Keep a model's weights under masks while it is trained: hooks that follow gradients and the steps of optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import InputError
from fxsparse.ir.masks import Masks
from fxsparse.train.steps import STEPS


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> AbstractContextManager[Training]:
    """Inside, whatever torch optimizers do to `model`, its masked weights are exactly zero after every step.

    Twice over: gradients of masked weights are zeroed as they arrive, before DistributedDataParallel averages them
    and before gradient norms are taken; and after every step of any torch.optim.Optimizer the weights are masked
    again, because momentum from before the mask still moves them. Weights are also masked on entry and on exit, so
    they are zero after the block even when something else than a torch optimizer wrote to them.
    The model's parameters must stay the same objects (load_state_dict and `.to(device)` keep them). Raises MaskError
    when a mask does not fit the model, InputError where a weight is in another such block already.
    """
    return hooked(model, lambda: [Weight(name, p, mask) for name, p, mask in parameters_of(model, masks)])


def parameters_of(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, parameter and mask of every mask. Raises MaskError when one does not fit the model."""
    parameters = dict(model.named_parameters())
    for name, mask in Masks(masks).check(model).items():
        yield name, parameters[name], mask


class Weight:
    """A parameter under a mask. What a gradient and a step do to it is what methods of training override.

    mask   bool, the parameter's shape: the weights that the model computes with; all others are 0 in it
    steps  steps that an optimizer with this parameter has made
    """

    needs_steps = False  # whether it has to know the steps of an optimizer one by one

    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor) -> None:
        self.name = name
        self.parameter: Any = parameter  # Any: torch's register_hook has no types
        self.mask = mask.clone()
        self.steps = 0

    def apply(self) -> None:
        """Zero what is masked."""
        self.follow()
        self.parameter.detach().masked_fill_(~self.mask, 0)

    def follow(self) -> None:
        """To the parameter's device: the model may be moved meanwhile."""
        self.mask = self.mask.to(self.parameter.device)

    def gradient(self, gradient: Tensor) -> Tensor:
        """What of a gradient counts, as it arrives."""
        # masked_fill, not a product: 0 * inf is NaN
        return gradient.masked_fill(~self.mask.to(gradient.device), 0)

    def before_step(self, optimizer: Optimizer, scale: Tensor | float) -> bool:
        """Whether what was done takes the place of the optimizer's step. `scale`: by which gradients are too large."""
        return False

    def reset_state(self, optimizer: Optimizer) -> None:
        """Of this optimizer, too: it steps inside the one that `before_step` was told of."""

    def after_step(self) -> None:
        """Count the step, and leave in the model what it computes with next."""
        self.steps += 1
        self.apply()

    def state(self) -> dict[str, Tensor]:
        """What training goes on from."""
        return {"mask": self.mask, "steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of what `state` was taken from."""
        self.mask, self.steps = state["mask"].to(self.parameter.device), int(state["steps"])


class Training:
    """The weights that are trained under masks, in the block of a `with`."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights

    @property
    def masks(self) -> Masks:
        """A copy of the masks as they are now, for `fxsparse.compile`."""
        return Masks({name: weight.mask for name, weight in self._weights.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Masks, steps and what else a method keeps, flat, to save beside the model's and the optimizer's."""
        return {f"{name}/{key}": value.clone() for name, w in self._weights.items() for key, value in w.state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there. Raises InputError unless it is of the same method and the same weights."""
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [n for n, x in own.items() if x.shape != state[n].shape]
        if wrong:
            raise InputError("state_dict of training", expected=f"the {len(own)} tensors of this method and model",
                             got=f"another {wrong[0]!r}, the first of {len(wrong)} differences",
                             do="Give what training.state_dict() gave inside the same kind of block.")  # fmt: skip
        for name, weight in self._weights.items():
            weight.load({key: state[f"{name}/{key}"].clone() for key in weight.state()})
            weight.apply()


@contextmanager
def hooked(model: nn.Module, make: Callable[[], list[Weight]]) -> Iterator[Training]:
    """Inside, the weights that `make` gives follow what torch optimizers do.

    Raises InputError where there are none, where one is in another block, and at the end where the model has other
    parameters than at the start.
    """
    weights = make()
    if not weights:
        raise InputError("weights to train", expected="at least one", got="none",
                         do="prunable(model) names those that fit; the last linear layer is left out.")  # fmt: skip
    with ExitStack() as undo, STEPS.of(weights):
        for weight in weights:
            undo.callback(_on_gradient(weight).remove)
            weight.apply()
        try:
            yield Training({weight.name: weight for weight in weights})
        finally:
            for weight in weights:
                weight.apply()
    _check_same(model, weights)


def _on_gradient(weight: Weight) -> Any:
    """A hook that also works for a parameter that is frozen now."""
    asks = weight.parameter.requires_grad
    handle = weight.parameter.requires_grad_(True).register_hook(weight.gradient)
    weight.parameter.requires_grad_(asks)
    return handle


def _check_same(model: nn.Module, weights: list[Weight]) -> None:
    parameters = dict(model.named_parameters())
    for weight in weights:
        if parameters.get(weight.name) is not weight.parameter:
            raise InputError(f"weight {weight.name!r} after training", expected="the parameter from the start",
                             got="another tensor, which no mask was applied to",
                             do="load_state_dict without assign=True, and .to(device), keep it.")  # fmt: skip
