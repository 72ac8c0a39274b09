"""What a format is: a way to store a sparse weight and to multiply by it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


class Format:
    """Subclasses live one to a file. All methods are pure."""

    name: str

    def why_not(self, node: fx.Node, weight: Tensor) -> str:
        """Why this layer cannot be stored so, in a few words; empty when it can."""
        raise NotImplementedError

    def pack(self, weight: Tensor) -> Any:
        """Store `weight` [O, I, kH, kW] or [O, I]; zeros are what the mask dropped."""
        raise NotImplementedError

    def unpack(self, packed: Any) -> Tensor:
        """The weight again, exactly."""
        raise NotImplementedError
