"""What every pass may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fxsparse.ir.facts import Facts
from fxsparse.ir.layout import Layout

# seconds for one convolution or linear node cut to (rows, columns)
LayerTimer = Callable[[fx.Node, int, int], float]


@dataclass
class Context:
    """Shared by the passes of one compilation.

    time_layer  measures one layer at other widths, to round them up where that is faster; None: never round
    facts, layout   what the last analysis found; the report reads them
    """

    time_layer: LayerTimer | None = None
    facts: Facts | None = None
    layout: Layout | None = None
