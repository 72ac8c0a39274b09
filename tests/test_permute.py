"""The order in which the blocks of a mask show, and the page that shows them."""

from __future__ import annotations

import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.coarsen import RowGroup, partition
from fxsparse.coarsen.page import page
from fxsparse.coarsen.permute import permutation, permuted
from tests.coarsening import layers


def test_rows_go_by_group_and_columns_by_use() -> None:
    groups = [
        RowGroup(torch.tensor([0, 3]), torch.tensor([1])),
        RowGroup(torch.tensor([1, 4]), torch.tensor([], dtype=torch.int64)),
        RowGroup(torch.tensor([2]), torch.tensor([0, 1, 4])),
    ]
    rows, columns = permutation(groups, 6, 5)
    assert rows.tolist() == [2, 0, 3, 1, 4, 5]
    assert columns.tolist() == [1, 0, 4, 2, 3]


@settings(max_examples=25, deadline=None)
@given(layers(), st.integers(1, 20))
def test_every_row_and_column_has_one_place_and_the_mask_only_moves(
    layer: tuple[dict[str, Tensor], dict[str, Tensor]], group_rows: int
) -> None:
    found = partition(*layer, group_rows=group_rows)
    for name, mask in found.masks.items():
        flat = mask.flatten(1)
        rows, columns = permutation(found.groups[name], *flat.shape)
        assert rows.sort().values.tolist() == list(range(flat.shape[0]))
        assert columns.sort().values.tolist() == list(range(flat.shape[1]))
        moved = permuted(mask, found.groups[name])
        assert moved[rows.argsort()][:, columns.argsort()].equal(flat)
        counts = moved.sum(0)
        assert bool((counts[:-1] >= counts[1:]).all())


def test_the_page_shows_each_mask_as_given_and_permuted_and_says_what_was_left() -> None:
    masks = {"<a>": torch.rand(40, 30) < 0.3, "deep": torch.ones(16, 1, 3, 3).bool()}
    found = partition({name: torch.randn(mask.shape) for name, mask in masks.items()}, masks)
    drawn: list[Tensor] = []

    def draw(mask: Tensor) -> str:
        drawn.append(mask)
        return f"data:{len(drawn)}"

    text = page(found, masks, "a <title>", draw)
    assert [mask.shape for mask in drawn] == [(40, 30)] * 3
    assert drawn[0].equal(masks["<a>"])
    assert drawn[2].equal(permuted(found.masks["<a>"], found.groups["<a>"]))
    assert re.findall(r'src="(.*?)"', text) == ["data:1", "data:2", "data:3"]
    assert "a &lt;title&gt;" in text
    assert "&lt;a&gt;" in text
    assert "<a>" not in text
    assert "deep: kept as it was: one input channel per row" in text
