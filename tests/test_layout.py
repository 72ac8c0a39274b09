"""Widths are rounded space by space, so the order of the spaces decides what is timed: it must not be an accident."""

import random
from itertools import pairwise

import pytest
import torch
from torch import fx, nn

from fxsparse.analysis.closure import smallest_layout
from fxsparse.analysis.sweep import analyze
from fxsparse.ir.capture import capture
from fxsparse.ir.masks import Masks
from fxsparse.passes import PIPELINE, Context, run, shrink_channels

WIDTHS = (3, 40, 50, 60, 70, 80, 90, 30)


def chain(dead: int) -> fx.GraphModule:
    """Linear layers in a row, `dead` rows of each at zero, ready for shrink_channels."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(i, o) for i, o in pairwise(WIDTHS)]).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight[:dead] = 0
            layer.bias[:dead] = 0
    gm = capture(model, (torch.randn(2, 3),), Masks(), dynamic_batch=True)
    run(gm, [step for step in PIPELINE if step is not shrink_channels], Context())
    return gm


def test_spaces_come_in_the_order_of_the_graph() -> None:
    gm = chain(dead=5)
    spaces = smallest_layout(gm, analyze(gm)).spaces()
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    places = [[(place[node], dim) for node, dim in space] for space in spaces]
    assert len(places) > len(WIDTHS)
    assert places == sorted(sorted(members) for members in places)


@pytest.mark.parametrize("seed", range(3))
def test_the_widths_that_are_timed_depend_on_nothing_but_the_times(seed: int) -> None:
    """Times at random by what is asked, so that the widths of one layer bear on what is asked about the next."""

    def asked() -> list[tuple[str, int, int]]:
        queries = []

        def time_layer(node: fx.Node, rows: int, columns: int) -> float:
            queries.append((str(node.args[1]), rows, columns))
            return random.Random(f"{seed} {queries[-1]}").random()

        shrink_channels.plan(chain(dead=5), Context(time_layer=time_layer))
        return queries

    first = asked()
    assert len({q[1:] for q in first}) > len(WIDTHS)
    assert asked() == first
