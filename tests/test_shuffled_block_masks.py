"""DSB's shuffled blocks against a plain transcription, and on any shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.coarsen import shuffled_block
from fxsparse.coarsen.cluster import complete_linkage, cosine
from fxsparse.errors import InputError
from tests.coarsening import DEGENERATE, check, layers

Given = tuple[dict[str, Tensor], dict[str, Tensor]]


def transcription(weight: Tensor, mask: Tensor, block: int, density: float) -> Tensor:
    """The released extract_blocks, group by group."""
    rows, columns = weight.shape
    labels = complete_linkage(1 - cosine(mask), rows // block).tolist()
    members = {label: [row for row in range(rows) if labels[row] == label] for label in labels}
    order = [row for each in sorted(members.values(), key=lambda each: (-len(each), each[0])) for row in each]
    found = []
    for start in range(0, rows, block):
        group = order[start : start + block]
        norm = [math.sqrt(sum(float(weight[r, c]) ** 2 for r in group if mask[r, c])) for c in range(columns)]
        ranked = sorted(range(columns), key=lambda c: -norm[c])
        for at in range(0, columns, block):
            chosen = ranked[at : at + block]
            found.append((sum(norm[c] for c in chosen), group, chosen))
    found.sort(key=lambda each: -each[0])
    new = torch.zeros_like(mask)
    for _, group, chosen in found[: math.ceil(density * rows * columns / block**2)]:
        new[torch.tensor(group)[:, None], torch.tensor(chosen)] = True
    return new


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [0.06, 0.25, 0.5])
def test_where_the_released_code_runs_the_blocks_are_its_own(seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 64, generator=generator) * torch.rand(48, 1, generator=generator)
    mask = torch.rand(48, 64, generator=generator) < density
    want = transcription(weight, mask, 8, int(mask.sum()) / mask.numel())
    got = shuffled_block({"w": weight}, {"w": mask}, block=8).masks["w"]
    assert torch.equal(got, want)


@settings(max_examples=50, deadline=None)
@given(layers(), st.integers(1, 20), st.sampled_from([None, 0.0, 0.3, 1.0]), st.sampled_from([None, 0.0, 0.4]))
def test_any_shape_is_blocked_and_the_density_is_exceeded_by_less_than_a_block(
    layer: Given, block: int, q: float | None, density: float | None
) -> None:
    found = check(lambda w, m: shuffled_block(w, m, block=block, q=q, density=density), *layer)
    for each in found.layers:
        wanted = each.density_before if density is None else density
        assert each.density_after < wanted + block**2 / found.masks[each.name].numel()
        assert all(len(group.rows) <= block for group in found.groups[each.name])


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_masks_are_no_trouble(kind: str) -> None:
    mask = DEGENERATE[kind]
    found = check(shuffled_block, {"w": torch.ones(mask.shape)}, {"w": mask})
    assert kind not in ("all zero", "all one") or torch.equal(found.masks["w"], mask.bool())


def test_rows_that_share_too_little_are_not_clustered() -> None:
    mask = torch.eye(4).repeat(8, 4)  # row r keeps the columns with r % 4
    weights = {"w": torch.ones(32, 16)}
    all_rows = shuffled_block(weights, {"w": mask}, block=8).groups["w"]
    assert [(group.rows % 4).unique().numel() for group in all_rows] == [1] * 4
    none = shuffled_block(weights, {"w": mask}, block=8, q=1.0).groups["w"]
    assert [group.rows.tolist() for group in none] == [list(range(start, start + 8)) for start in range(0, 32, 8)]


def test_a_weight_that_was_just_grown_counts_as_much_as_the_mean() -> None:
    weight, mask = torch.full((4, 4), 0.1), torch.zeros(4, 4)
    mask[:2], weight[:2, :2], weight[0, 0], weight[1, 2:] = 1, 0.0, 3.0, 0.3
    kept = shuffled_block({"w": weight}, {"w": mask}, block=2, density=0.25).masks["w"]
    assert kept.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, r"block 0: expected a positive number of rows; got 0\.\n  32 or 64"),
        ({"q": 2.0}, r"q 2\.0: expected a similarity of two rows, .*; got 2\.0\.\n  None clusters every row"),
        ({"density": -0.1}, r"density -0\.1: expected a fraction of weights to keep"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shuffled_block({"w": torch.ones(2, 2)}, {"w": torch.eye(2)}, **options)
