"""RigL: sparse from the first step to the last; now and then the smallest weights make room for others.

after every `every` steps t, until t_end = `until` of all, in each layer with k weights:
    n = floor(f(t) k),  f(t) = alpha / 2 (1 + cos(pi t / t_end))
    keep the k - n largest |w|; of all others, grow the n of largest |dL/dw|, which the mask let nothing of through
    grown weights are 0, and what the optimizer keeps for them too; one that was just dropped keeps both
That takes the place of the optimizer's step.
Source: Evci et al., Rigging the Lottery (ICML 2020), Algorithm 1, and its released code; with grow="random" what is
called SET there. (Mocanu et al., 2018, drop by sign, a constant fraction each epoch, and grow weights that are not 0.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import InputError
from fxsparse.prune.largest import largest
from fxsparse.train.masked import Training, Weight, hooked, parameters_of
from fxsparse.train.ranges import check_ranges


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
    alpha  the fraction of a layer's weights that the first change drops
    until  the fraction of the steps after which the masks stay
    grow   "gradient", or "random" (SET), drawn with `seed`

    The loop around it is the user's own; the block gives a `Training`, whose `.masks` are the masks of the moment.
    Under DistributedDataParallel all processes change their masks alike, since gradients are averaged by then. On the
    steps before a change gradients are dense when norms are taken. Of an optimizer's state, tensors of the weight's
    shape are 0 where a weight was grown. Raises InputError on numbers outside their range and gradients that are not
    finite, MaskError when a mask does not fit the model.
    """
    schedule = Schedule(steps, every, alpha, until)
    known = grow in ("gradient", "random")
    check_ranges((f"grow={grow!r}", grow, known, "'gradient' or 'random'", "'gradient' is RigL, 'random' is SET."))
    drawn = None if grow == "gradient" else seed
    return hooked(
        model, lambda: [DynamicMask(name, p, m, schedule, drawn) for name, p, m in parameters_of(model, masks)]
    )


@dataclass(frozen=True)
class Schedule:
    """When masks change, and by how much. Raises InputError on numbers outside their range."""

    steps: int
    every: int
    alpha: float
    until: float

    def __post_init__(self) -> None:
        whole, end = "a positive whole number", self.until * self.steps
        for name, fits, expected, do in (
            ("steps", self.steps >= 1, whole, "It is the number of optimizer steps of the whole training."),
            ("alpha", 0 < self.alpha <= 1, "a fraction, 0 < alpha <= 1", "0.3 drops at most three of ten weights."),
            ("until", 0 < self.until <= 1, "a fraction, 0 < until <= 1", "0.75 keeps masks for the last quarter."),
            ("every", self.every >= 1, whole, "100 steps on CIFAR, 800 on ImageNet are what papers used."),
            ("every", self.every < end, f"less than until * steps = {end:g}", "Or the masks would never change."),
        ):
            value = getattr(self, name)
            check_ranges((f"{name}={value!r}", value, fits, expected, do))

    def due(self, step: int) -> bool:
        """Whether masks change once so many steps have been made."""
        return 0 < step < self.until * self.steps and step % self.every == 0

    def fraction(self, step: int) -> float:
        """Of a layer's weights that are dropped then."""
        return self.alpha / 2 * (1 + math.cos(math.pi * step / (self.until * self.steps)))


class DynamicMask(Weight):
    """A weight whose mask changes on a schedule, by its gradient, or at random where there is a seed."""

    needs_steps = True

    def __init__(
        self, name: str, parameter: nn.Parameter, mask: Tensor, schedule: Schedule, seed: int | None = None
    ) -> None:
        super().__init__(name, parameter, mask)
        self.schedule, self.seed = schedule, seed
        self.grown: Tensor | None = None  # between a change and the end of the step that it takes the place of

    def gradient(self, gradient: Tensor) -> Tensor:
        """All of it before a change."""
        return gradient if self.schedule.due(self.steps) else super().gradient(gradient)

    def before_step(self, optimizer: Optimizer, scale: Tensor | float) -> bool:
        """Change the mask when that is due."""
        gradient = self.parameter.grad
        if not self.schedule.due(self.steps) or gradient is None:
            return False
        check_finite(f"gradient of {self.name!r}", gradient)
        self.follow()
        old, self.mask = self.mask, self.drop_and_grow(self.parameter.detach(), self._score(gradient))
        self.grown = self.mask & ~old
        self.reset_state(optimizer)
        return True

    def reset_state(self, optimizer: Optimizer) -> None:
        """What an optimizer keeps for each weight starts from 0 where it was grown, as the weight itself does."""
        for value in optimizer.state.get(self.parameter, {}).values():
            if self.grown is not None and isinstance(value, Tensor) and value.shape == self.grown.shape:
                value.masked_fill_(self.grown.to(value.device), 0)

    def after_step(self) -> None:
        self.grown = None
        super().after_step()

    def drop_and_grow(self, weight: Tensor, score: Tensor) -> Tensor:
        """The next mask; `score` ranks weights to grow."""
        kept = int(self.mask.sum())
        drop = int(self.schedule.fraction(self.steps) * kept)
        stays = largest(weight.abs().masked_fill(~self.mask, -1), kept - drop)
        return stays | largest(score.masked_fill(stays, -1), drop)

    def _score(self, gradient: Tensor) -> Tensor:
        if self.seed is None:
            return gradient.abs()
        stream = hashlib.sha256(f"{self.seed} {self.name} {self.steps}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(stream))
        return torch.randperm(gradient.numel(), generator=generator).view(gradient.shape).to(gradient.device)


def check_finite(what: str, tensor: Tensor) -> None:
    """Raises InputError on NaN and infinity, which rank nothing."""
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise InputError(what, expected="finite numbers, to choose what to keep",
                         got=f"{wrong} NaN or infinite of {tensor.numel()}",
                         do="Training has diverged: lower the learning rate; with float16, a GradScaler.")  # fmt: skip
