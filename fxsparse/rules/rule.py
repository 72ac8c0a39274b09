"""What an operator does to facts and layouts. Without a rule an operator claims nothing: everything stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.ir.bits import any_along
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import arg, operator_name, owner
from fxsparse.ir.layout import Layout


@dataclass(frozen=True)
class Sample:
    """A small use of an operator, for the property tests: a function of tensors, and the shapes of its inputs.

    Dimension 0 is the batch. Channels are dimension 1 of 4-d inputs and the last dimension of others.
    """

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


class Rule:
    """One operator, or a family of operators with the same algebra. This base is the sound default.

    A rule may be wrong in one direction only: to call a known element unknown, an unneeded one demanded, or to keep
    more indices than necessary costs speed. The other direction changes results, and the property tests look for it.
    """

    ops: tuple[Any, ...] = ()
    at_any_size: bool = False  # what it says holds whatever its symbolic sizes are, along all dimensions

    def mixed(self, node: fx.Node, rank: int) -> Iterable[int]:
        """Dimensions of the first input (of `rank`) along which an output depends on more than one position.

        Where one has a symbolic size, the default takes the rule's place: what holds for one size may not for others.
        """
        return ()

    def unknown(self, node: fx.Node, facts: Facts) -> Tensor:
        """Bool of the output's shape: elements that depend on the input."""
        return torch.ones_like(facts.value[node], dtype=torch.bool)

    def demand(self, node: fx.Node, facts: Facts, demanded: Tensor) -> Mapping[fx.Node, Tensor]:
        """For each input value: bool of its shape, elements needed for the `demanded` elements of the output."""
        return {n: torch.ones_like(facts.unknown[n]) for n in node.all_input_nodes if n in facts.unknown}

    def couple(self, node: fx.Node, facts: Facts, layout: Layout) -> None:
        """Grow the layouts of inputs and output until the operator can be cut to them. No others are looked at."""
        cause = f"{operator_name(node)} ({owner(node)}) has no rule: everything it reads stays"
        for n in [node, *node.all_input_nodes]:
            if n in layout.kept:
                layout.pin(n, cause)

    def rewrite(self, node: fx.Node, facts: Facts, layout: Layout) -> dict[str, Any]:
        """Arguments that change with the layout, by schema name. Empty when tensors alone change."""
        return {}

    def samples(self) -> Iterable[Sample]:
        """Uses the property tests run: few channels, odd sizes, every argument that matters."""
        return ()


def run(
    node: fx.Node, facts: Facts, replace: Mapping[fx.Node, Tensor], changes: Mapping[str, Any] | None = None
) -> Any:
    """The node's operator on `replace`, on known values for all other inputs, and with `changes` by schema name."""
    args, kwargs = node.args, node.kwargs
    if changes:
        schema = cast(Any, node.target)._schema.arguments
        args = tuple(changes.get(p.name, arg(node, p.name)) for p in schema if not p.kwarg_only)
    args, kwargs = fx.map_arg((args, kwargs), lambda n: replace[n] if n in replace else facts.operand(n))
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def vjp(function: Callable[[Tensor], Tensor], like: Tensor, demanded: Tensor) -> Tensor:
    """Bool of `like`'s shape: inputs that reach a demanded output of `function`, which is linear and non-negative."""
    with torch.enable_grad():
        x = torch.zeros(like.shape, dtype=torch.float32, device=like.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x), x, demanded.float())
    return gradient > 0


def reduce_to(bits: Tensor, shape: torch.Size) -> Tensor:
    """OR of `bits` over the dimensions along which a tensor of `shape` was broadcast."""
    bits = any_along(bits, list(range(bits.dim() - len(shape))))
    dims = [d for d, size in enumerate(shape) if size == 1 and bits.shape[d] != 1]
    return any_along(bits, dims, keepdim=True)


def tie_leading(node: fx.Node, source: fx.Node, layout: Layout, dims: Iterable[int]) -> None:
    """Tie `dims` of the input `source` to the same dimensions of the output."""
    for dim in dims:
        layout.tie(source, dim, node, dim, f"coupled by {operator_name(node)} ({owner(node)})")
