"""Weights that the model does not compute with but that are trained too, to take the place of others later."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.train.masked import Weight
from fxsparse.train.rigl import check_finite


class DenseWeight(Weight):
    """A weight that is dense for the optimizer alone: outside of its steps the model holds what the mask keeps.

    dense  after the last step; where the mask keeps it, the parameter itself is what counts
    """

    needs_steps = True

    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor) -> None:
        super().__init__(name, parameter, mask)
        self.dense = parameter.detach().clone()

    def before_step(self, optimizer: Optimizer, scale: Tensor | float) -> bool:
        """Put in what was left out."""
        self.follow()
        self.dense = torch.where(self.mask, self.parameter, self.dense.to(self.parameter))
        self.parameter.copy_(self.dense)
        if self.parameter.grad is not None:
            self.parameter.grad.add_((self.penalty() * scale).to(self.parameter.grad))
        return False

    def after_step(self) -> None:
        """Keep the dense weight, and look again for what the model computes with."""
        check_finite(f"weight {self.name!r}", self.parameter.detach())
        self.dense = self.trained(self.parameter.detach())
        self.mask = self.chosen(self.dense)
        super().after_step()

    def penalty(self) -> Tensor:
        """What is added to the gradient."""
        raise NotImplementedError

    def trained(self, weight: Tensor) -> Tensor:
        """The dense weight, from what the optimizer left."""
        return weight.clone()

    def chosen(self, weight: Tensor) -> Tensor:
        """The mask of the next steps."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"dense": self.dense}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.dense = state["dense"].to(self.parameter)
