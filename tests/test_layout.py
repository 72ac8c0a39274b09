"""Widths are rounded space by space, so the order of the spaces decides what is timed: it must not be an accident."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import fx, nn

from fxsparse.analysis.closure import close, smallest_layout
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


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "shufflenet_v2": torchvision.models.shufflenet_v2_x0_5,
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 3), 16),
    "vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 48, 96),
}


def sparse(name: str) -> nn.Module:
    """Rows of each weight are zero, or all; batch norms leave zeros as they are."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.dim() > 1):
            p[torch.rand(len(p)) < (0.3 if i % 9 else 1)] = 0
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias.zero_()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_layout_that_grows_is_closed_by_looking_around_what_grew(name: str) -> None:
    gm = capture(sparse(name), (torch.randn(1, 3, 64, 64),), Masks(), dynamic_batch=True)
    run(gm, [step for step in PIPELINE if step is not shrink_channels], Context())
    facts = analyze(gm)
    closed = smallest_layout(gm, facts)
    ends = [(n, d) for n, kept in closed.kept.items() for d, bits in enumerate(kept) if not bits.all()]
    before = {n: [bits.clone() for bits in kept] for n, kept in closed.kept.items()}
    for node, dim in random.Random(0).sample(ends, 20):
        near, far = closed.clone(), closed.clone()
        for layout in (near, far):
            layout.grow(node, dim, torch.arange(len(closed.kept[node][dim])) % 3 == 0, "grown")
        close(gm, facts, near, grown=[node])
        close(gm, facts, far)
        assert near.tied == far.tied
        for n in far.kept:
            assert all(map(torch.equal, near.kept[n], far.kept[n])), n
            assert all(map(torch.equal, before[n], closed.kept[n])), n


class Block(nn.Module):
    """Two residual steps, 48 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(48, 64) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(64, 48) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(down(x).relu())
        return x


class Packing:
    """What packed layers take, in seconds: `summed` (or alone) where the width is no multiple of 16, otherwise 1."""

    def __init__(self, alone: float, summed: float) -> None:
        self.alone, self.summed = alone, summed

    def __call__(self, node: fx.Node, packed: object, summed: bool = False) -> float:
        rows, columns = packed.shape  # type: ignore[attr-defined]
        if 64 not in (rows, columns):
            return 9.0  # not in the block
        return (self.summed if summed else self.alone) if rows % 16 or columns % 16 else 1.0


@pytest.mark.parametrize(
    ("alone", "summed", "dense", "rounded"),
    [
        (1.0, 1.0, 2.0, False),
        (1.1, 1.1, 2.0, True),
        (1.0, 1.5, 2.0, True),  # only the sums gain
        (0.9, 1.1, 2.0, False),  # and that is less than the layers lose
        (1.1, 1.5, 0.5, False),  # dense layers are faster: what packing gains does not matter
    ],
)
def test_packed_layers_are_rounded_with_their_sums(alone: float, summed: float, dense: float, rounded: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), Block(), nn.Linear(48, 16)).eval()
    with torch.no_grad():
        for layer in (model[0], *model[1].up):  # the residual stream has 45 channels left
            layer.weight[:3] = layer.bias[:3] = 0
        for layer in (*model[1].down, *model[1].up):
            layer.weight[:16, 20:] = 0
    gm = capture(model, (torch.randn(2, 32),), Masks(), dynamic_batch=True)
    run(gm, [step for step in PIPELINE if step is not shrink_channels], Context())
    ctx = Context(time_layer=lambda *_: dense, time_format=Packing(alone, summed), formats=("shuffled_block",))
    shrink_channels.plan(gm, ctx)
    assert ctx.layout is not None
    found = {causes for n in gm.graph.nodes if n.op == "get_attr" for causes in ctx.layout.why(n, 0)}
    assert ("rounded up to 48: measured faster" in found) == rounded


@pytest.mark.parametrize("best", [12, 18, 24])
def test_whole_groups_are_rounded_and_all_that_grows_is_timed(best: int) -> None:
    """12 rows, 4 groups of 3: 16 of them would be one row of a fifth group. All 8 channels before make it 24."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 24, 3, groups=8, bias=False), nn.Conv2d(24, 5, 1)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        layers[0].weight[4:] = layers[1].weight[12:] = 0
    x = torch.randn(2, 3, 6, 6).double()
    gm = capture(model, (x,), Masks(), dynamic_batch=True)
    run(gm, PIPELINE, Context(time_layer=lambda _, rows, columns: 0.5 if (rows, columns) == (best, 1) else 1.0))
    assert {b.shape for b in gm.buffers() if b.dim() == 4} == {(best // 3, 3, 1, 1), (best, 1, 3, 3), (5, best, 1, 1)}
    torch.testing.assert_close(gm(x), model(x))
