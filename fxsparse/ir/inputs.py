"""What a model is called with; flattened, its batch size and device, and what a build does to it first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import InputError

# On CUDA torch compares the batch of a batch norm with this, to choose between cuDNN's and its own, which compute the
# same. torch.export takes that for a limit of the model's, and refuses sizes without one.
CUDNN_BATCH = 65535
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

    def like(self, example: Call, signature: inspect.Signature | None) -> Call:
        """This call in the form of `example`: by position what is so there, with and without defaults as there.

        Raises TypeError for what `signature` does not take, ValueError for other arguments than the example's.
        """
        if signature is None:
            return self
        signature.bind(*self.args, **self.kwargs)
        given, wanted = self._by_name(signature), example._by_name(signature)
        for name in given.keys() ^ wanted.keys():
            if not _is_default(signature, name, given[name] if name in given else wanted[name]):
                raise ValueError(f"another argument: {name}")
        found = {**wanted, **given}
        return Call(
            tuple(found[name] for name in list(wanted)[: len(example.args)]), {n: found[n] for n in example.kwargs}
        )

    def names(self, signature: inspect.Signature | None) -> list[str]:
        """What `signature` calls them, by position and then by name; a number where it has no word for one."""
        found = self._by_name(signature or inspect.Signature())
        return [f"input {name + 1}" if isinstance(name, int) else name for name in found]

    def _by_name(self, signature: inspect.Signature) -> dict[int | str, Any]:
        """By number what is only known by its place."""
        names = [n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        first = sum(p.kind is p.POSITIONAL_ONLY for p in signature.parameters.values())
        keys: list[int | str] = [*range(first), *names, *range(first + len(names), len(self.args))]
        return dict(zip([*keys[: len(self.args)], *self.kwargs], [*self.args, *self.kwargs.values()], strict=True))


def _is_default(signature: inspect.Signature, name: int | str, value: Any) -> bool:
    """Of a kind that nobody can change; -0.0 is not 0.0, 1 is not True."""
    parameter = signature.parameters.get(str(name))
    default = parameter.default if parameter is not None else inspect.Parameter.empty
    plain = value is None or isinstance(value, (bool, int, float, str))
    return plain and same_constant(value, default)


def exported(model: nn.Module, call: Call, *, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """What torch.export makes of `model`, for this call or for any batch size. Its errors pass through."""
    if not dynamic_batch:
        return torch.export.export(model, call.args, dict(call.kwargs), strict=False)
    try:
        return _any_batch(model, call, None)
    except torch._dynamo.exc.UserError as error:
        if f"max={CUDNN_BATCH})" not in str(error):
            raise
        return _any_batch(model, call, CUDNN_BATCH)


def _any_batch(model: nn.Module, call: Call, largest: int | None) -> torch.export.ExportedProgram:
    """torch.export takes a size of 1 in the example for a constant: it gets two samples, and is told the batch."""
    leaves, spec = pytree.tree_flatten(call)
    follow = in_batch(leaves)
    if batch_size(leaves) == 1:
        leaves = [torch.cat([x, x]) if varies else x for x, varies in zip(leaves, follow, strict=True)]
    call = pytree.tree_unflatten(leaves, spec)
    batch, shapes = torch.export.Dim("batch", min=1, max=largest), torch.export.ShapesCollection()
    for x, varies in zip(leaves, follow, strict=True):  # by tensor, whatever the signature (*args, dicts)
        if varies:
            shapes[x] = {0: batch}
    return torch.export.export(model, call.args, dict(call.kwargs), dynamic_shapes=shapes, strict=False)


def same_constant(a: Any, b: Any) -> bool:
    """Whether they are the same to any function: 2 is not 2.0, and 0.0 not -0.0."""
    if type(a) is not type(b):
        return False
    return repr(a) == repr(b) if isinstance(a, (float, complex)) else bool(a == b)


def signature_of(model: nn.Module) -> inspect.Signature | None:
    """By which one call of `model` can be told to be another; None where something looks at how it is written.

    Hooks do, and so may a decorator: then the signature is the decorator's own.
    """
    hooks = (model._forward_hooks, model._forward_pre_hooks)
    if any(hooks) or type(model).__call__ is not nn.Module.__call__:
        return None
    try:
        return inspect.signature(model.forward, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def batch_size(inputs: Iterable[Any]) -> int:
    """Dimension 0 of the first tensor that has dimensions; 1 without one."""
    return next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim()), 1)


def in_batch(inputs: Sequence[Any]) -> list[bool]:
    """Of each input, whether dimension 0 is the batch: all tensors with as many there as `batch_size` says."""
    batch = batch_size(inputs)
    return [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == batch for x in inputs]


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
