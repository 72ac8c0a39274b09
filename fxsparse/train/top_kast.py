"""Top-KAST: compute with the largest weights, train somewhat more of them, so that others can come up.

A    the D largest |w| of a layer, D its density: what the model computes with
B    the D + M largest: what gradients and steps reach; all other weights stay as they are, unseen
     gradient of w in A: + decay w;  in B but not in A: + decay / D w;  a weight that is tried out has to be worth more
A and B are chosen anew after every `every` steps.
Source: Jayakumar et al., Top-KAST: Top-K Always Sparse Training (NeurIPS 2020); the penalty as SparseML has it, with D
the density, not the sparsity. It is added to the gradient that the optimizer takes, after gradients are clipped.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import InputError, near
from fxsparse.prune.largest import largest
from fxsparse.prune.prunable import prunable
from fxsparse.train.dense import DenseWeight
from fxsparse.train.masked import Training, Weight, hooked
from fxsparse.train.ranges import check_ranges


def top_kast(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    extra: float = 0.1,
    decay: float = 1e-4,
    every: int = 10,
    exclude: Iterable[str] = (),
) -> AbstractContextManager[Training]:
    """Inside, `model` computes with the largest weights of each layer and trains some more of them.

    density  of A, for each layer or by parameter name, as `fxsparse.prune.erk_densities` gives it; above 0
    extra    M: the density of B is density + extra, at most 1
    decay    takes the place of the optimizer's weight decay for these weights, which has to be 0: warns otherwise
    every    steps between two choices of A and B
    exclude  modules or parameters to leave dense; the head always is, see `prunable`. Not beside densities by name

    The loop around it is the user's own; the block gives a `Training`, whose `.masks` are A. Between steps the model's
    own weights are 0 where A has none, so it can be evaluated and saved; to go on from there takes
    `Training.state_dict`, where the others are. Raises InputError on numbers outside their range, names of no weight,
    and weights that are not finite.
    """
    weights = prunable(model, exclude=exclude)
    densities = dict(density) if isinstance(density, Mapping) else dict.fromkeys(weights, density)
    _check(densities, extra, decay, every)
    _check_names(model, density, exclude)

    def made() -> list[Weight]:
        parameters, told = dict(model.named_parameters()), list[str]()
        return [_TopKast(name, parameters[name], d, extra, decay, every, told) for name, d in densities.items()]

    return hooked(model, made)


class _TopKast(DenseWeight):
    """One weight.

    backward_mask  B
    told           shared by all of a block: the weight that was warned of
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        density: float,
        extra: float,
        decay: float,
        every: int,
        told: list[str],
    ) -> None:
        self.density, self.extra, self.decay, self.every = density, extra, decay, every
        self.backward_mask = _most(parameter.detach(), density + extra)
        self.told = told
        super().__init__(name, parameter, _most(parameter.detach(), density))

    def follow(self) -> None:
        super().follow()
        self.backward_mask = self.backward_mask.to(self.parameter.device)

    def gradient(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(~self.backward_mask.to(gradient.device), 0)

    def before_step(self, optimizer: Optimizer, scale: Tensor | float) -> bool:
        if not self.told and self._decayed_twice(optimizer):
            self.told.append(self.name)
            warnings.warn(
                "the optimizer's weight decay also acts on weights of top_kast, whose own takes its place: give them a "
                "parameter group with weight_decay=0.",
                UserWarning,
                stacklevel=_outside(),
            )
        return super().before_step(optimizer, scale)

    def _decayed_twice(self, optimizer: Optimizer) -> bool:
        groups = [g for g in optimizer.param_groups if any(p is self.parameter for p in g["params"])]
        return any(group.get("weight_decay", 0) for group in groups)

    def penalty(self) -> Tensor:
        rate = torch.where(self.mask, self.decay, self.decay / self.density)
        return self.dense * rate.masked_fill(~self.backward_mask, 0)

    def trained(self, weight: Tensor) -> Tensor:
        """Outside of B momentum and the optimizer's weight decay move nothing."""
        return torch.where(self.backward_mask, weight, self.dense)

    def chosen(self, weight: Tensor) -> Tensor:
        if (self.steps + 1) % self.every:
            return self.mask
        self.backward_mask = _most(weight, self.density + self.extra)
        return _most(weight, self.density)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"backward_mask": self.backward_mask}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.backward_mask = state["backward_mask"].to(self.parameter.device)


def _outside() -> int:
    """The `stacklevel`, for who calls this, of the line that has the optimizer make a step."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fxsparse", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _most(weight: Tensor, density: float) -> Tensor:
    """The mask of that fraction of a layer's weights, of one at least."""
    return largest(weight.abs(), min(weight.numel(), max(1, round(density * weight.numel()))))


def _check(densities: Mapping[str, float], extra: float, decay: float, every: int) -> None:
    check_ranges(
        *(
            (f"density of {name!r}", d, 0 < d <= 1, "a fraction, 0 < density <= 1", "80 % zeros is density 0.2.")
            for name, d in densities.items()
        ),
        ("extra", extra, 0 <= extra <= 1, "a fraction, 0 <= extra <= 1", "0 never lets another weight in."),
        ("decay", decay, decay >= 0, "a number that is not negative", "1e-4 is a usual weight decay."),
        ("every", every, every >= 1, "a positive whole number", "1 chooses anew after each step."),
    )


def _check_names(model: nn.Module, density: object, exclude: Iterable[str]) -> None:
    if not isinstance(density, Mapping):
        return
    names = [name for name, _ in model.named_parameters()]
    for name in density:
        if name not in names:
            do = near(name, names) or "fxsparse.prune.erk_densities(prunable(model), density) has them."
            raise InputError(f"density of {name!r}", expected="the name of a parameter", got="no parameter's", do=do)
    if [*exclude]:
        raise InputError("exclude", expected="nothing beside densities by name", got=repr([*exclude]),
                         do="What has no density stays dense.")  # fmt: skip
