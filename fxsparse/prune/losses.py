"""The user's loss of every batch, and its gradient, as functions of weights given beside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxsparse.errors import InputError
from fxsparse.prune.stateless import wide

Loss = Callable[[nn.Module, Any], Tensor]


def losses(model: nn.Module, loss: Loss, batches: Iterable[Any], weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """loss(model, batch) for every batch, of `weights` by parameter name; every batch finds the same buffers.

    Raises InputError without batches, and on a loss that is no finite scalar or does not depend on the weights.
    """
    wrapped, number = _WithLoss(model, loss), -1
    for number, batch in enumerate(several(batches)):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        tensors = {f"model.{name}": tensor for name, tensor in {**buffers, **weights}.items()}
        yield _checked(functional_call(wrapped, tensors, (batch,)), number)
    if number < 0:
        raise InputError("batches", expected="at least one batch", got="none",
                         do="A generator that was read before is empty: give a list, or make it again.")  # fmt: skip


def several(batches: Iterable[Any]) -> Iterable[Any]:
    """`batches`. Raises InputError for one tensor, whose rows would be taken for batches."""
    if isinstance(batches, Tensor):
        raise InputError("batches", expected="a list or another iterable of batches",
                         got=f"one tensor of shape {tuple(batches.shape)}", do="For one batch: [batch].")  # fmt: skip
    return batches


def gradient(model: nn.Module, loss: Loss, batches: Iterable[Any], weights: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradient by each of `weights`, summed over the batches; zero where the loss does not depend on one."""
    total = [torch.zeros_like(wide(weight)) for weight in weights.values()]
    for value in losses(model, loss, batches, weights):
        grads = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
        total = [t + grad for t, grad in zip(total, grads, strict=True)]
    return total


class _WithLoss(nn.Module):
    """functional_call puts tensors into modules; the user's loss is a function of one."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def _checked(value: object, number: int) -> Tensor:
    where = f"loss of batch {number}"
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(where, expected="a scalar tensor", got=got,
                         do="Average over the batch: reduction='mean', or .mean().")  # fmt: skip
    if not bool(value.isfinite().all()):
        raise InputError(where, expected="a finite number", got=f"{value.item():g}",
                         do="Look at the batch and the weights: one of them holds NaN or is very large.")  # fmt: skip
    if not value.requires_grad:
        raise InputError(where, expected="a function of the model's weights", got="a tensor without gradient",
                         do="Call the model that loss is given, without detach, item or no_grad.")  # fmt: skip
    return value.reshape(())
