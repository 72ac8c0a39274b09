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

from fxsparse.coarsen.n_m import n_m
from fxsparse.errors import InputError
from fxsparse.prune.prunable import prunable
from fxsparse.train.hidden import Hidden
from fxsparse.train.masked import Training, training


def sr_ste(
    model: nn.Module, *, n: int = 2, m: int = 4, decay: float = 2e-4, exclude: Iterable[str] = ()
) -> AbstractContextManager[Training]:
    """Inside, `model` computes with the N largest of every M weights along the input channels, and trains all of them.

    n, m     the pattern, as in `fxsparse.coarsen.n_m`
    decay    of weights that are left out; the optimizer's own weight decay acts on all
    exclude  modules or parameters to leave dense; the head always is, see `prunable`

    Layers whose input channels are no multiple of M stay dense and have no mask. The loop around it is the user's own,
    with any optimizer of torch's; the block gives a `Training`, whose `.masks` are N:M. Outside of steps the model's
    own weights are 0 where its mask is, so it can be evaluated and saved at any time; to go on from there takes
    `Training.state_dict`, where the others are. Raises InputError on another pattern and numbers outside their range.
    """
    if not decay >= 0:
        raise InputError(f"decay={decay!r}", expected="a number that is not negative", got=repr(decay),
                         do="2e-4 is the paper's.")  # fmt: skip
    weights = prunable(model, exclude=exclude)
    found = n_m(weights, {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}, n=n, m=m)
    parameters = dict(model.named_parameters())
    fitting = [layer.name for layer in found.layers if not layer.fallback]
    return training({name: _SrSte(parameters[name], found.masks[name], n, m, decay) for name in fitting})


class _SrSte(Hidden):
    def __init__(self, parameter: nn.Parameter, mask: Tensor, n: int, m: int, decay: float) -> None:
        super().__init__(parameter, mask)
        self.n, self.m, self.decay = n, m, decay

    def gradient(self, gradient: Tensor) -> Tensor:
        """All of it: straight through."""
        return gradient

    def pull(self) -> Tensor:
        return self.decay * self.hidden.masked_fill(self.mask, 0)

    def chosen(self, weight: Tensor) -> Tensor:
        every = {"weight": torch.ones_like(weight, dtype=torch.bool)}
        return n_m({"weight": weight}, every, n=self.n, m=self.m).masks["weight"]
