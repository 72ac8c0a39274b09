"""Top-KAST: compute with the largest weights, train somewhat more of them, so that others can come up.

A    the D largest |w| of a layer, D its density: what the model computes with
B    the D + M largest: what gradients and steps reach; all other weights stay as they are, unseen
     gradient of w in A: + decay w;  in B but not in A: + decay / D w;  a weight that is tried out has to be worth more
A and B are looked for again after every `every` steps.
Source: Jayakumar et al., Top-KAST: Top-K Always Sparse Training (NeurIPS 2020). D is the density, not the sparsity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fxsparse.errors import InputError
from fxsparse.prune.largest import largest
from fxsparse.prune.prunable import prunable
from fxsparse.train.hidden import Hidden
from fxsparse.train.masked import Training, training


def top_kast(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    more: float = 0.1,
    decay: float = 1e-4,
    every: int = 1,
    exclude: Iterable[str] = (),
) -> AbstractContextManager[Training]:
    """Inside, `model` computes with the largest weights of each layer and trains some more of them.

    density  of A, for each layer or by parameter name, as `fxsparse.prune.erk_densities` gives it; above 0
    more     M: the density of B is density + more, at most 1
    decay    takes the place of the optimizer's weight decay for these weights, which should be 0
    every    steps between two choices of A and B
    exclude  modules or parameters to leave dense, where `density` is one number; the head always is, see `prunable`

    The loop around it is the user's own, with any optimizer of torch's; the block gives a `Training`, whose `.masks`
    are A. Outside of steps the model's own weights are 0 where A has none, so it can be evaluated and saved at any
    time; to go on from there takes `Training.state_dict`, where the others are. Raises InputError on numbers outside
    their range and names of no weight.
    """
    weights = prunable(model, exclude=exclude)
    densities = dict(density) if isinstance(density, Mapping) else dict.fromkeys(weights, density)
    _check(densities, more, decay, every)
    parameters = dict(model.named_parameters())
    unknown = sorted(densities.keys() - parameters.keys())
    if unknown:
        raise InputError(f"density of {unknown[0]!r}", expected="the name of a parameter", got="no parameter's",
                         do="fxsparse.prune.erk_densities(prunable(model), density) has the names.")  # fmt: skip
    return training({name: _TopKast(parameters[name], d, more, decay, every) for name, d in densities.items()})


class _TopKast(Hidden):
    def __init__(self, parameter: nn.Parameter, density: float, more: float, decay: float, every: int) -> None:
        self.density, self.more, self.decay, self.every = density, more, decay, every
        self.trains = self._most(parameter.detach(), density + more)
        super().__init__(parameter, self._most(parameter.detach(), density))

    def gradient(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(~self.trains.to(gradient.device), 0)

    def pull(self) -> Tensor:
        rate = torch.where(self.mask, self.decay, self.decay / self.density)
        return self.hidden * rate.masked_fill(~self.trains, 0)

    def trained(self, weight: Tensor) -> Tensor:
        """Outside of B momentum and the optimizer's weight decay move nothing."""
        return torch.where(self.trains, weight, self.hidden)

    def chosen(self, weight: Tensor) -> Tensor:
        if (self.steps + 1) % self.every:
            return self.mask
        self.trains = self._most(weight, self.density + self.more)
        return self._most(weight, self.density)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"trains": self.trains}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.trains = state["trains"].to(self.parameter.device)

    @staticmethod
    def _most(weight: Tensor, density: float) -> Tensor:
        return largest(weight.abs(), min(weight.numel(), round(density * weight.numel())))


def _check(densities: Mapping[str, float], more: float, decay: float, every: int) -> None:
    for where, value, fits, expected, do in (
        *(
            (
                f"density of {name!r}",
                d,
                0 < d <= 1,
                "a share of weights, 0 < density <= 1",
                "80 % zeros is density 0.2.",
            )
            for name, d in densities.items()
        ),
        ("more", more, 0 <= more <= 1, "a share of weights, 0 <= more <= 1", "0 never lets another weight in."),
        ("decay", decay, decay >= 0, "a number that is not negative", "1e-4 is a usual weight decay."),
        ("every", every, every >= 1, "a positive whole number", "1 chooses anew after each step."),
    ):
        if not fits:
            raise InputError(where, expected=expected, got=repr(value), do=do)
