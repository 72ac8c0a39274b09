"""RigL: sparse from the first step to the last; now and then the smallest weights make room for others.

after every `every` steps t, until `until` of all, in each layer with k weights:
    n = floor(f(t) k),  f(t) = alpha / 2 (1 + cos(pi t / (until * steps)))
    keep the k - n largest |w|; of all others, grow the n of largest |dL/dw|, which the mask let nothing of through
    grown weights are 0, and what the optimizer remembers of them too; one that was just dropped keeps both
That takes the place of the optimizer's step.
Source: Evci et al., Rigging the Lottery (ICML 2020), Algorithm 1, and its released code; with grow="random", SET:
Mocanu et al. (2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import InputError
from fxsparse.prune.largest import largest
from fxsparse.train.masked import Training, Weight, parameters_of, training


def rigl(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    steps: int,
    every: int = 100,
    alpha: float = 0.3,
    until: float = 0.75,
    grow: str = "gradient",
    seed: int = 0,
) -> AbstractContextManager[Training]:
    """Inside, `model` is trained under masks that change as RigL does it; every layer keeps its number of weights.

    masks  to start from, by parameter name: `fxsparse.prune.erk` gives those of the paper
    steps  optimizer steps of the whole training
    every  steps between two changes of the masks
    alpha  the share of a layer's weights that the first change drops
    until  the share of the steps after which the masks stay
    grow   "gradient", or "random" (SET), drawn with `seed`

    The loop around it is the user's own, with any optimizer of torch's; the block gives a `Training`, whose `.masks`
    are the masks of the moment. Under DistributedDataParallel all processes change their masks alike, since gradients
    are averaged by then. On the steps before a change gradients are dense when norms are taken. Raises InputError on
    numbers outside their range and gradients that are not finite, MaskError when a mask does not fit the model.
    """
    schedule = Schedule(steps, every, alpha, until)
    check_grow(grow)
    return training(
        {
            name: Moving(parameter, mask, schedule, None if grow == "gradient" else seed + i)
            for i, (name, parameter, mask) in enumerate(parameters_of(model, masks))
        }
    )


@dataclass(frozen=True)
class Schedule:
    """When masks change, and by how much. Raises InputError on numbers outside their range."""

    steps: int
    every: int
    alpha: float
    until: float

    def __post_init__(self) -> None:
        whole = "a positive whole number"
        for name, fits, expected, do in (
            ("steps", self.steps >= 1, whole, "It is the number of optimizer steps of the whole training."),
            ("every", self.every >= 1, whole, "100 steps on CIFAR, 800 on ImageNet are what papers used."),
            ("alpha", 0 < self.alpha <= 1, "a share, 0 < alpha <= 1", "0.3 drops at most three of ten weights."),
            ("until", 0 < self.until <= 1, "a share, 0 < until <= 1", "0.75 keeps the masks for the last quarter."),
        ):
            value = getattr(self, name)
            if not fits:
                raise InputError(f"{name}={value!r}", expected=expected, got=repr(value), do=do)

    def due(self, step: int) -> bool:
        """Whether masks change once so many steps have been made."""
        return 0 < step < self.until * self.steps and step % self.every == 0

    def share(self, step: int) -> float:
        """Of a layer's weights that are dropped then."""
        return self.alpha / 2 * (1 + math.cos(math.pi * step / (self.until * self.steps)))


class Moving(Weight):
    """A weight whose mask changes on a schedule, by its gradient, or by chance where there is a seed."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor, schedule: Schedule, seed: int | None = None) -> None:
        super().__init__(parameter, mask)
        self.schedule, self.seed = schedule, seed

    def gradient(self, gradient: Tensor) -> Tensor:
        """All of it before a change."""
        return gradient if self.schedule.due(self.steps) else super().gradient(gradient)

    def before_step(self, optimizer: Optimizer) -> bool:
        """Change the mask when that is due."""
        gradient = self.parameter.grad
        if not self.schedule.due(self.steps) or gradient is None:
            return False
        check_finite(gradient)
        old, self.mask = self.mask, self.changed(self.parameter.detach(), self._promise(gradient))
        forget(optimizer, self.parameter, self.mask & ~old)
        return True

    def changed(self, weight: Tensor, promise: Tensor) -> Tensor:
        """The next mask; `promise` ranks weights to grow."""
        kept = int(self.mask.sum())
        drop = int(self.schedule.share(self.steps) * kept)
        stays = largest(weight.abs().masked_fill(~self.mask, -1), kept - drop)
        return stays | largest(promise.masked_fill(stays, -1), drop)

    def _promise(self, gradient: Tensor) -> Tensor:
        if self.seed is None:
            return gradient.abs()
        generator = torch.Generator().manual_seed(self.seed + self.steps)
        return torch.randperm(gradient.numel(), generator=generator).view(gradient.shape).to(gradient.device)


def forget(optimizer: Optimizer, parameter: nn.Parameter, grown: Tensor) -> None:
    """What an optimizer keeps for each weight starts from 0 where it was grown, as the masked weight itself does."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(grown.to(value.device), 0)


def check_finite(gradient: Tensor) -> None:
    """Raises InputError on NaN and infinity, which rank nothing."""
    wrong = int((~gradient.isfinite()).sum())
    if wrong:
        raise InputError("gradient of a masked weight", expected="finite numbers, to choose what to grow",
                         got=f"{wrong} NaN or infinite of {gradient.numel()}",
                         do="Training has diverged: lower the learning rate; with float16, a GradScaler.")  # fmt: skip


def check_grow(grow: str) -> None:
    """Raises InputError unless it is known."""
    if grow not in ("gradient", "random"):
        raise InputError(f"grow={grow!r}", expected="'gradient' or 'random'", got=repr(grow),
                         do="'gradient' is RigL, 'random' is SET.")  # fmt: skip
