"""SR-STE: train dense weights of which the model computes with the N largest of every M.

forward   w M(w), M the mask of `coarsen.n_m`, looked for again after every step
backward  straight through: dL/d(w M) + decay (1 - M) w for the dense w, which pulls what is left out toward 0
Source: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (ICLR 2021), equation 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fxsparse.coarsen.n_m import largest_of_every, n_m
from fxsparse.formats.n_m import check_pattern
from fxsparse.prune.prunable import prunable
from fxsparse.train.dense import DenseWeight
from fxsparse.train.masked import Training, Weight, hooked
from fxsparse.train.ranges import check_ranges


def sr_ste(
    model: nn.Module, *, n: int = 2, m: int = 4, decay: float = 2e-4, exclude: Iterable[str] = ()
) -> AbstractContextManager[Training]:
    """Inside, `model` computes with the N largest of every M weights along the input channels, and trains all of them.

    n, m     the pattern, as in `fxsparse.coarsen.n_m`
    decay    of weights that are left out; the optimizer's own weight decay acts on all
    exclude  modules or parameters to leave dense; the head always is, see `prunable`

    Layers whose input channels are no multiple of M stay dense and have no mask. The loop around it is the user's own,
    the block gives a `Training`, whose `.masks` are N:M. Between steps the model's own weights are 0 where its mask is,
    so it can be evaluated and saved; to go on from there takes `Training.state_dict`, where the others are. Raises
    InputError on another pattern, numbers outside their range, weights that are not finite, and without a layer.
    """
    check_ranges((f"decay={decay!r}", decay, decay >= 0, "a number that is not negative", "2e-4 is the paper's."))
    check_pattern(n, m)

    def made() -> list[Weight]:
        weights, parameters = prunable(model, exclude=exclude), dict(model.named_parameters())
        found = n_m(weights, {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}, n=n, m=m)
        fitting = [layer.name for layer in found.layers if not layer.fallback]
        return [_SrSte(name, parameters[name], found.masks[name], n, m, decay) for name in fitting]

    return hooked(model, made)


class _SrSte(DenseWeight):
    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor, n: int, m: int, decay: float) -> None:
        super().__init__(name, parameter, mask)
        self.n, self.m, self.decay = n, m, decay

    def gradient(self, gradient: Tensor) -> Tensor:
        """All of it: straight through."""
        return gradient

    def penalty(self) -> Tensor:
        return self.decay * self.dense.masked_fill(self.mask, 0)

    def chosen(self, weight: Tensor) -> Tensor:
        return largest_of_every(weight, torch.ones_like(weight, dtype=torch.bool), self.n, self.m)
