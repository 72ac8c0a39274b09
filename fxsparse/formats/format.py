"""What a format is: a way to store a sparse weight and to multiply by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx


class Packed(Protocol):
    """A stored weight. `str()` says what there is to it, for the report."""

    @property
    def nse(self) -> int:
        """Stored elements."""

    @property
    def work(self) -> int:
        """Multiply-adds per position, in those of a dense layer: the model of its time where nothing is timed."""

    @property
    def row_groups(self) -> list[NDArray[np.int64]]:
        """Rows that are stored together, which `permute_channels` will make neighbours."""


class Standard(NamedTuple):
    """What a packed weight is in standard operators alone, as ONNX wants it.

    work        multiply-accumulates per position, in stored elements of a dense weight, overheads included
    row_groups  the groups in the order in which these operators give their rows: numbered so, no gather is needed
    """

    work: int
    row_groups: list[NDArray[np.int64]]


class Format:
    """Subclasses live one to a file and are found there.

    layers    the operators that it is for
    operator  the format's own operator, that `lower` puts into a graph; None when it needs none
    """

    name: str
    layers: tuple[torch._ops.OpOverload, ...]
    operator: torch._ops.OpOverload | None = None
    reads_in_order: bool = False  # whether it depends on which columns are neighbors: then they are not renumbered
    writes_anywhere: bool = False  # whether rows of a group that are no neighbors cost it nothing

    def why_not(self, node: fx.Node, weight: Tensor) -> str:
        """Why this convolution or linear node cannot be stored so, in a few words; empty when it can."""
        raise NotImplementedError

    def why_not_untimed(self, node: fx.Node) -> str:
        """Why it is not chosen where nothing is timed, although it holds less; empty when it may be."""
        return ""

    def pack(self, weight: Tensor, groups: Sequence[NDArray[np.int64]] | None = None) -> Packed:
        """Store the nonzeros of `weight` [O, I, kH, kW] or [O, I]; `groups` as an earlier packing found them."""
        raise NotImplementedError

    def unpack(self, packed: Any) -> Tensor:
        """The weight again, exactly."""
        raise NotImplementedError

    def lower(self, gm: fx.GraphModule, node: fx.Node, packed: Any) -> fx.Node:
        """Insert the format's own operator before `node`; returns the node whose value replaces it."""
        raise NotImplementedError

    def into(self, gm: fx.GraphModule, node: fx.Node) -> Sequence[Any] | None:
        """For `node`, a call of `operator`: what its twin `<operator>_into` takes beside the output.

        None where it has no twin, or the node's arguments are none for it.
        """
        return None

    def check_call(self, arguments: Sequence[Any]) -> None:
        """Raise InputError unless a call of `operator` that comes from a file is one that `lower` could have made.

        arguments  of the call, with the stored tensors in place of the nodes that read them
        """
        raise NotImplementedError

    def why_not_standard(self, node: fx.Node, weight: Tensor) -> str:
        """The same for targets that run `expand`: they need no kernel of ours."""
        return self.why_not(node, weight)

    def standard(self, packed: Any) -> Standard:
        """The cost of `expand`, for targets that have standard operators only."""
        return Standard(packed.work, packed.row_groups)

    def expand(self, gm: fx.GraphModule, node: fx.Node) -> fx.Node:
        """Insert ATen operators that do the work of `node`, a call of `operator`; returns the one that replaces it."""
        raise NotImplementedError
