"""What every pass may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from fxsparse.ir.facts import Facts
from fxsparse.ir.layout import Layout

# seconds for one convolution or linear node cut to (rows, columns)
LayerTimer = Callable[[fx.Node, int, int], float]

# seconds to turn a value on a GPU: features first, or last again
TurnTimer = Callable[[fx.Node, bool], float]


class FormatTimer(Protocol):
    """Seconds for one such node with a packed weight.

    summed     with the sum that follows it
    scattered  with its rows where they are, else as if they were in order
    A linear layer in shuffled blocks on a GPU is timed with features first, x and y: see `TurnTimer`.
    """

    def __call__(self, node: fx.Node, packed: Any, summed: bool = False, scattered: bool = False) -> float: ...


@dataclass
class Context:
    """Shared by the passes of one compilation.

    time_layer  measures one layer at other widths, to round them up where that is faster; None: never round
    time_format  measures one layer with a packed weight; None: the number of stored elements decides
    formats      names of the formats that the target runs, for `choose_formats`
    force_formats  choose a format wherever one fits, whatever it takes: for tests
    standard_operators  formats will be expanded: their work is counted so, and their groups are put in that order
    batch        samples of the example, which layers are timed with
    time_turn    measures what such a layer's neighbors cost it, on a GPU; None: nothing
    facts, layout   what the last analysis found; the report reads them
    """

    time_layer: LayerTimer | None = None
    time_format: FormatTimer | None = None
    formats: tuple[str, ...] = ()
    force_formats: bool = False
    standard_operators: bool = False
    batch: int = 1
    time_turn: TurnTimer | None = None
    facts: Facts | None = None
    layout: Layout | None = None
