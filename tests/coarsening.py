"""Random weights and masks, and what every coarsening into row groups promises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.coarsen import Coarsened, Layer

DEGENERATE = {
    "all zero": torch.zeros(20, 6),
    "all one": torch.ones(20, 6),
    "one row": torch.tensor([[1, 0, 1, 1, 0]]),
    "one column": torch.tensor([[1], [0], [1], [1], [1]]),
    "one weight": torch.ones(1, 1),
    "one weight, masked": torch.zeros(1, 1),
    "rows not a multiple of 16": torch.ones(37, 2, 3, 3),
    "one row kept": torch.eye(40)[:1].repeat(40, 1) * torch.eye(40)[:, 3:4],
    "depthwise": torch.ones(32, 1, 3, 3),
}


@st.composite
def layers(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One or two layers of any shape and density, some with rows and columns of very different weights."""
    weights, masks = {}, {}
    for name in draw(st.sampled_from([("a",), ("a", "b")])):
        shape = (draw(st.integers(1, 70)), draw(st.integers(2, 9)), *draw(st.sampled_from([(), (1, 1), (2, 3)])))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
        scale = (torch.randn(shape[:2], generator=generator) * spread).exp().view(*shape[:2], *[1] * (len(shape) - 2))
        weights[name] = torch.randn(shape, generator=generator) * scale
        masks[name] = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.02, 0.2, 0.5, 0.95]))
    return weights, masks


def check(coarsen: Callable[[dict[str, Tensor], dict[str, Tensor]], Coarsened], weights: dict[str, Tensor],
          masks: dict[str, Tensor]) -> Coarsened:  # fmt: skip
    """Run it twice: same result, arguments unchanged; groups disjoint, dense, all there is; numbers right."""
    before = [{n: t.clone() for n, t in each.items()} for each in (weights, masks)]
    found, again = coarsen(weights, masks), coarsen(weights, masks)
    for each, copied in zip((weights, masks), before, strict=True):
        assert all(torch.equal(t, copied[n]) for n, t in each.items())
    assert found.masks == again.masks
    assert str(found) == str(again)
    for layer in found.layers:
        check_layer(found, layer, weights[layer.name], masks[layer.name].bool())
    return found


def check_layer(found: Coarsened, layer: Layer, weight: Tensor, mask: Tensor) -> None:
    coarse = found.masks[layer.name]
    assert coarse.shape == mask.shape
    if layer.fallback.startswith("kept as it was"):
        assert torch.equal(coarse, mask)
    else:
        rows = torch.cat([torch.empty(0, dtype=torch.int64), *(g.rows for g in found.groups[layer.name])])
        assert len(rows) == len(rows.unique())
        blocks = torch.zeros_like(coarse.flatten(1))
        for group in found.groups[layer.name]:
            blocks[group.rows[:, None], group.columns] = True
        assert torch.equal(blocks, coarse.flatten(1))
    kept = weight.double().square() * mask
    assert layer.density_after == int(coarse.sum()) / coarse.numel()
    assert layer.added - layer.removed == int(coarse.sum()) - int(mask.sum())
    assert abs(layer.l2_kept - (float((kept * coarse).sum() / kept.sum()) if kept.any() else 1.0)) < 1e-9
    assert 0 <= layer.l1_kept <= 1 + 1e-9
