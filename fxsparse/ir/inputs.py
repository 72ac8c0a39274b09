"""What a model is called with; flattened, its batch size and device, and what a build does to it first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsparse.errors import InputError

Prepare = Callable[[Sequence[Any]], Sequence[Any]]


class Call(NamedTuple):
    """What a model is called with, by position and by keyword."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: object) -> Call:
        """A tensor alone, a tuple of positional inputs, or a dict of inputs by name. Raises InputError for others."""
        if isinstance(inputs, Tensor):
            return cls((inputs,), {})
        if isinstance(inputs, (tuple, list)):
            return cls(tuple(inputs), {})
        if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
            return cls((), dict(inputs))
        raise InputError("example_inputs", expected="a tuple of positional inputs, or a dict of inputs by name",
                         got="a dict with other keys" if isinstance(inputs, Mapping) else type(inputs).__name__,
                         do="For one image: (torch.randn(1, 3, 224, 224),). By name: {'input_ids': ids}.")  # fmt: skip

    def canonical(self, signature: inspect.Signature | None) -> Call:
        """The one way to say it: by position what can be, without what is the default anyway.

        Raises TypeError for what `signature` does not take.
        """
        if signature is None:
            return self
        bound = signature.bind(*self.args, **self.kwargs)
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)  # no name to go by after a gap
        if not any(p.kind in by_place for p in signature.parameters.values()):
            defaults = {name: p.default for name, p in signature.parameters.items()}
            bound.arguments = {n: x for n, x in bound.arguments.items() if not _same(x, defaults[n])}
        return Call(bound.args, bound.kwargs)

    def names(self, signature: inspect.Signature | None) -> list[str]:
        """What `signature` calls them, by position and then by name; a number where it has no word for one."""
        parameters = signature.parameters.values() if signature is not None else ()
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        more = [f"input {i + 1}" for i in range(len(known), len(self.args))]
        return [*known[: len(self.args)], *more, *sorted(self.kwargs)]


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """None where Python knows none."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def batch_size(inputs: Iterable[Any]) -> int:
    """Dimension 0 of the first tensor that has dimensions; 1 without one."""
    return next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim()), 1)


def device_of(inputs: Iterable[Any]) -> torch.device:
    """Of the first tensor; the CPU without one."""
    return next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))


def in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x` with its dimensions in memory in this order, the one with the largest stride first."""
    return x.permute(list(order)).contiguous().permute(sorted(order, key=lambda dim: order[dim]))


def as_is(inputs: Sequence[Any]) -> Sequence[Any]:
    """The inputs themselves."""
    return inputs


def inputs_channels_last(inputs: Sequence[Any]) -> Sequence[Any]:
    """Images in channels_last, all else as it is."""
    return [channels_last(x) for x in inputs]


def channels_last(x: Any) -> Any:
    """`x` in channels_last when it is a tensor of four dimensions."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


LAYOUTS: dict[str, Prepare] = {"as is": as_is, "channels_last": inputs_channels_last}
