"""What a reader gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fxsparse.ir.masks import Masks


@dataclass(frozen=True)
class Checkpoint:
    """A pruned model's file.

    source   what it was recognized as: the name of its reader
    masks    by parameter name of the model without any pruning wrapper
    weights  the state dict of that model, masked weights zero; None where the file holds masks only
    """

    source: str
    masks: Masks
    weights: Mapping[str, Tensor] | None = None

    def __repr__(self) -> str:
        held = "no weights" if self.weights is None else f"{len(self.weights)} tensors"
        return f"Checkpoint({self.source}, {self.masks!r}, {held})"
