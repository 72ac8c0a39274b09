"""Weights that the model does not compute with but that are trained too, to take the place of others later."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.train.masked import Weight


class Hidden(Weight):
    """A weight that is dense for the optimizer alone: outside of its steps the model holds what the mask keeps.

    hidden  the dense weight after the last step; where the mask keeps it, the parameter itself is what counts
    """

    def __init__(self, parameter: nn.Parameter, mask: Tensor) -> None:
        super().__init__(parameter, mask)
        self.hidden = parameter.detach().clone()

    def before_step(self, optimizer: Optimizer) -> bool:
        """Put in what was left out."""
        self.hidden = torch.where(self.mask, self.parameter, self.hidden.to(self.parameter))
        self.parameter.copy_(self.hidden)
        if self.parameter.grad is not None:
            self.parameter.grad.add_(self.pull().to(self.parameter.grad))
        return False

    def after_step(self) -> None:
        """Keep the dense weight, and look again for what the model computes with."""
        self.hidden = self.trained(self.parameter.detach())
        self.mask = self.chosen(self.hidden)
        super().after_step()

    def pull(self) -> Tensor:
        """What is added to the gradient."""
        raise NotImplementedError

    def trained(self, weight: Tensor) -> Tensor:
        """The dense weight, from what the optimizer left."""
        return weight.clone()

    def chosen(self, weight: Tensor) -> Tensor:
        """The mask of the next steps."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"hidden": self.hidden}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.hidden = state["hidden"].to(self.parameter)
