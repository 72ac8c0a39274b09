"""The steps of all optimizers, for weights that have to know of them: one pair of torch's hooks for all blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxsparse.errors import InputError

if TYPE_CHECKING:
    from fxsparse.train.masked import Weight

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Steps:
    """Tells weights before and after a step of the optimizer that holds them.

    An optimizer that steps inside another (ZeroRedundancyOptimizer, a wrapper) is part of that one's step.
    """

    def __init__(self) -> None:
        self._weights: dict[int, Weight] = {}  # by the parameter's id
        self._open: Optimizer | None = None
        self._told: list[Weight] = []
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._hooks: list[Any] = []

    @contextmanager
    def of(self, weights: Sequence[Weight]) -> Iterator[None]:
        """Inside, these weights are told. Raises InputError where one is told already."""
        mine = {id(weight.parameter): weight for weight in weights}
        twice = [weight.name for key, weight in mine.items() if key in self._weights]
        if twice:
            raise InputError(f"weight {twice[0]!r}", expected="one block of fxsparse.train at a time",
                             got="a weight that is in another block already",
                             do="Every method masks its weights by itself: it needs no masked around it.")  # fmt: skip
        if not self._weights:
            before, after = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
            self._hooks = [before(self._before), after(self._after)]
        self._weights |= mine
        try:
            yield
        finally:
            self._weights = {key: weight for key, weight in self._weights.items() if key not in mine}
            if not self._weights:
                for hook in self._hooks:
                    hook.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self._open is not None and self._open is not optimizer and _is_stepping(self._open):
            for weight in self._told:
                weight.reset_state(optimizer)
            return None
        weights = [w for g in optimizer.param_groups for p in g["params"] if (w := self._weights.get(id(p)))]
        if not weights:
            return None
        self._open, self._told, self._gradients = optimizer, [], []
        given = _with_gradients(optimizer, args, kwargs) if any(w.needs_steps for w in weights) else None
        if not _overflown(optimizer):
            self._tell(optimizer, weights)
        return given

    @torch.no_grad()
    def _tell(self, optimizer: Optimizer, weights: list[Weight]) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler that leaves it to a fused optimizer
        self._told = weights
        replaced = [weight.before_step(optimizer, 1.0 if scale is None else scale) for weight in weights]
        if any(replaced):
            held = [p for group in optimizer.param_groups for p in group["params"]]
            self._gradients = [(p, p.grad) for p in held]
            for parameter in held:
                parameter.grad = None  # for every optimizer of torch's, the way to leave a parameter as it is

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer is not self._open:
            return
        self._open = None
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for weight in self._told:
            weight.after_step()
        self._told, self._gradients = [], []


def _is_stepping(optimizer: Optimizer) -> bool:
    """Whether this is called from its step. After one that raised it is not, though nothing told of its end."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _overflown(optimizer: Optimizer) -> bool:
    """Whether a GradScaler found that the optimizer, a fused one, is to skip the step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _with_gradients(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """The step's arguments, with a closure's gradients there already: methods look at them before the step.

    Args begin with the optimizer itself. Raises InputError for an optimizer that may call it more than once.
    """
    closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    if isinstance(optimizer, LBFGS) or not type(optimizer).__module__.startswith("torch.optim"):
        raise InputError(f"closure of {type(optimizer).__name__}.step", expected="an optimizer that calls it once",
                         got="one that may call it several times, between which masks would change",
                         do="Call loss.backward() and then step() without a closure.")  # fmt: skip
    with torch.enable_grad():
        loss = closure()
    return (args[0], lambda: loss), {}


STEPS = Steps()
