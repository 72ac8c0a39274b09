"""Movements are followed at one position along dimensions that pass through: the same as following every element."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxsparse.analysis.closure import smallest_layout
from fxsparse.analysis.sweep import analyze
from fxsparse.ir.capture import capture
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import operator_name, owner
from fxsparse.ir.layout import Layout
from fxsparse.ir.lines import lines_of
from fxsparse.ir.masks import Masks
from fxsparse.ir.symbols import crossing
from fxsparse.passes import Context, canonicalize, run
from fxsparse.rules import Sample
from fxsparse.rules.movement import Movement, _scatter, _sources
from tests.test_rules import SAMPLES, SEEDS, wrapped_graph

MOVEMENTS = [pytest.param(s, id=f"{name}-{i}") for name, i, s in SAMPLES if name == "Movement"]
MAPS: dict[str, tuple[Callable[..., Tensor], list[list[int]], set[int]]] = {
    "permute": (lambda x: x.permute(0, 2, 1), [[2, 3, 4]], {0, 1, 2}),
    "heads": (lambda x: x.view(1, 5, 3, 4).transpose(1, 2), [[1, 5, 12]], {2}),
    "merge": (lambda x: x.transpose(1, 2).reshape(1, 5, 12), [[1, 3, 5, 4]], {1}),
    "cat": (lambda x, y: torch.cat([x, y], 1), [[2, 3, 4, 5], [2, 6, 4, 5]], {2, 3}),  # 0: strides differ
    "beside nothing": (lambda x, y: torch.cat([x, y], 1), [[2, 3], [2, 0]], set()),
    "pad": (lambda x: nn.functional.pad(x, (1, 1), value=-1.0), [[2, 3, 4]], {0, 1}),
    "flip": (lambda x: x.flip(1), [[2, 3, 4]], {0, 2}),
    "windows": (lambda x: x.view(2, 2, 3, 2, 3, 4).transpose(2, 3), [[2, 6, 6, 4]], {0, 5}),
    "slice": (lambda x: x[:, 1:], [[2, 3, 4]], {0, 2}),
    "select": (lambda x: x[:, 1], [[2, 3, 4]], {0, 1}),
    "expand": (lambda x: x.unsqueeze(1).expand(2, 3, 4), [[2, 4]], {0, 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_the_one_position_and_what_passes_through(name: str) -> None:
    move, shapes, through = MAPS[name]
    sizes = [int(np.prod(s)) for s in shapes]
    starts = np.cumsum([0, *sizes])
    parts = [torch.arange(a, a + n).double().view(s) for a, n, s in zip(starts, sizes, shapes, strict=False)]
    index = move(*parts).to(torch.int32)
    lines = lines_of(index, shapes)
    assert set(lines.through) == through
    small_starts = np.cumsum([0, *lines.sizes])
    for at in np.ndindex(*index.shape):
        small = int(lines.index[tuple(0 if d in through else p for d, p in enumerate(at))])
        if small < 0:
            assert index[at] == -1
            continue
        source = int(np.searchsorted(small_starts, small, side="right")) - 1
        place = list(np.unravel_index(small - small_starts[source], lines.shapes[source]))
        for dim, dims in lines.through.items():
            place[dims[source]] = at[dim]
        assert index[at] == starts[source] + np.ravel_multi_index(place, shapes[source])


def follow_every_element(rule: Movement, node: fx.Node, facts: Facts, layout: Layout) -> None:
    sources, index = _sources(node, facts), rule._map(node, facts)
    cause = f"coupled by {operator_name(node)} ({owner(node)})"
    rule._pin_symbolic(node, layout, cause)
    for n, mixed in zip((sources[0], node), crossing(node), strict=True):
        layout.pin(n, "mixes", mixed)
    kept = torch.cat([layout.rectangle(n).flatten() for n in sources])
    layout.grow_elements(node, kept[index.clamp_min(0)] & (index >= 0), cause)
    sizes = [facts.unknown[n].numel() for n in sources]
    for n, part in zip(sources, _scatter(index[layout.rectangle(node)], sum(sizes)).split(sizes), strict=True):
        layout.grow_elements(n, part.view(layout.shape(n)), cause)


def same_layouts(gm: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = analyze(gm)
    fast = smallest_layout(gm, facts)
    monkeypatch.setattr(Movement, "couple", follow_every_element)
    slow = smallest_layout(gm, facts)
    monkeypatch.undo()
    for node, kept in slow.kept.items():
        for a, b in zip(kept, fast.kept[node], strict=True):
            assert torch.equal(a, b), node


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sample", MOVEMENTS)
def test_the_layouts_are_those_of_following_every_element(
    sample: Sample, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_layouts(wrapped_graph(sample, seed)[1], monkeypatch)


@pytest.mark.parametrize("name", ["swin_t", "shufflenet_v2_x1_0", "densenet121"])
def test_so_are_those_of_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() in (2, 4)][:-1]
    masks = {n: (torch.rand(len(p)) < 0.5).view(-1, *[1] * (p.dim() - 1)).expand_as(p) for n, p in weights}
    gm = capture(model, (torch.randn(1, 3, 64, 64),), Masks(masks), dynamic_batch=True)
    run(gm, [canonicalize], Context())
    same_layouts(gm, monkeypatch)
