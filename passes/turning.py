"""Which linear layers stay in shuffled blocks on a GPU, where they read and write features first.

What else makes their x, or reads their y, has features last, so a layer pays for its turns. Between two such layers
nothing is turned: one that becomes dense lets the other turn. So those that hang together are weighed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

from torch import fx

from fxsparse.formats.gpu import together, turns
from fxsparse.passes.context import Context


class Weighed(NamedTuple):
    """Seconds with one layer packed and with it dense, given what becomes of the others.

    turning  of the first, for turning its x and y
    without  of the second, for what others turn then
    """

    stays: bool
    packed: float
    dense: float
    turning: float
    without: float


class Alone(NamedTuple):
    """Seconds of one layer alone, packed and dense, and what it has to be faster than, times the latter."""

    packed: float
    dense: float
    margin: float


Layers = tuple[fx.Node, ...]


def weigh(gm: fx.GraphModule, alone: dict[fx.Node, Alone], ctx: Context) -> dict[fx.Node, Weighed]:
    """What becomes of these packed layers, and why."""
    return {layer: w for chain in together(gm, list(alone)) for layer, w in _Chain(gm, chain, alone, ctx).weighed()}


class _Chain:
    """Layers of which one's turns depend on whether another is packed."""

    def __init__(
        self, gm: fx.GraphModule, layers: Sequence[fx.Node], alone: dict[fx.Node, Alone], ctx: Context
    ) -> None:
        self.gm, self.layers, self.alone, self.ctx = gm, tuple(layers), alone, ctx

    def weighed(self) -> Iterator[tuple[fx.Node, Weighed]]:
        kept = self._best()
        for layer in self.layers:
            others = tuple(n for n in kept if n is not layer)
            turned, without = self._turning_s((*others, layer)), sum(self._turning_s(others).values())
            own = turned[layer]
            more = without - (sum(turned.values()) - own)
            packed, dense, _ = self.alone[layer]
            yield layer, Weighed(layer in kept, packed + own, dense + more, own, more)

    def _best(self) -> Layers:
        """Those that stay packed: one after the other is left out, or all, while that pays."""
        kept, kept_s = self.layers, self._cost_s(self.layers)
        while kept:
            fewer = dict.fromkeys([*(tuple(n for n in kept if n is not layer) for layer in kept), ()])
            best, best_s = min(((each, self._cost_s(each)) for each in fewer), key=lambda pair: pair[1])
            if best_s >= kept_s:
                break
            kept, kept_s = best, best_s
        return kept

    def _cost_s(self, kept: Layers) -> float:
        dense = [self.alone[n].dense * self.alone[n].margin for n in self.layers if n not in kept]
        return sum(self.alone[n].packed for n in kept) + sum(self._turning_s(kept).values()) + sum(dense)

    def _turning_s(self, kept: Layers) -> dict[fx.Node, float]:
        time_turn = cast("Callable[[fx.Node, bool], float]", self.ctx.time_turn)
        found = dict.fromkeys(kept, 0.0)
        for layer, needed in turns(self.gm, kept).items():
            x = needed.x * time_turn(cast(fx.Node, layer.args[0]), True) if needed.x else 0.0
            found[layer] = x + (time_turn(layer, False) if needed.y else 0.0)
        return found
