"""Our own row groups: what they promise on any mask, and that they keep what can be kept."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse import coarsen
from fxsparse.coarsen import Cost, partition, shuffled_block
from fxsparse.coarsen.cost import WEIGHTS, best_columns, price
from fxsparse.coarsen.swaps import by_energy, group_energy, improve
from fxsparse.errors import InputError, MaskError
from tests.coarsening import DEGENERATE, check, layers
from tools import compare_partitioners

Given = tuple[dict[str, Tensor], dict[str, Tensor]]


@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(1, 40), st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_rows_of_a_group_share_one_list_of_columns_and_the_density_is_never_exceeded(
    layer: Given, rows: int, density: float | None
) -> None:
    found = check(lambda w, m: partition(w, m, group_rows=rows, density=density), *layer)
    for each in found.layers:
        assert each.density_after <= (each.density_before if density is None else density)
        sizes = [len(group.rows) for group in found.groups[each.name]]
        assert sorted(sizes) == sorted([rows] * (each.rows // rows) + [each.rows % rows] * (each.rows % rows > 0))


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_degenerate_masks_are_no_trouble(kind: str, rows: int) -> None:
    mask = DEGENERATE[kind]
    found = check(lambda w, m: partition(w, m, group_rows=rows), {"w": torch.ones(mask.shape)}, {"w": mask})
    if kind in ("all zero", "all one"):
        assert torch.equal(found.masks["w"], mask.bool())


def test_a_depthwise_convolution_is_passed_on_and_the_report_says_so() -> None:
    mask = torch.rand(32, 1, 3, 3) < 0.5
    found = partition({"w": torch.ones(mask.shape)}, {"w": mask})
    assert torch.equal(found.masks["w"], mask)
    assert found.layers[0].fallback == "kept as it was: one input channel per row, as in a depthwise convolution"
    assert str(found).endswith(f"w: {found.layers[0].fallback}")


def test_shuffled_blocks_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(128, 100, dtype=torch.bool)
    for rows in torch.randperm(128, generator=generator).split(32):
        mask[rows[:, None], torch.randperm(100, generator=generator)[:20]] = True
    weight = torch.randn(128, 100, generator=generator)
    found = partition({"w": weight}, {"w": mask}, group_rows=32)
    assert torch.equal(found.masks["w"], mask)
    assert found.layers[0].l2_kept == 1
    coarse = partition({"w": weight}, {"w": mask}, group_rows=64)
    assert coarse.layers[0].l2_kept > 0.4  # two lists of columns have to share one


def test_swaps_come_close_to_the_best_of_all_groupings() -> None:
    sizes, budget, share = torch.tensor([2, 2, 2]), 16, []
    every = [torch.tensor(each) for each in sorted(set(itertools.permutations([0, 0, 1, 1, 2, 2])))]
    for seed in range(8):
        energy = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)).pow(3)
        start = by_energy(energy, sizes)
        labels = improve(energy, start, sizes, budget, 20)
        assert kept(energy, labels, sizes, budget) >= kept(energy, start, sizes, budget)
        best = max(kept(energy, each, sizes, budget) for each in every)
        share.append(kept(energy, labels, sizes, budget) / best)
    assert sum(share) / len(share) > 0.94


def kept(energy: Tensor, labels: Tensor, sizes: Tensor, budget: float) -> float:
    sums = group_energy(energy, labels, len(sizes))
    return float((sums * best_columns(sums, sizes, budget)).sum())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_the_columns_chosen_fit_the_budget_and_one_more_does_not(
    groups: int, columns: int, seed: int, share: float, plain: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(groups, columns, generator=generator)
    rows = torch.randint(1, 70, (groups,), generator=generator)
    cost = WEIGHTS if plain else Cost(overhead_columns=0.0)
    budget = share * cost.total(rows, torch.full((groups,), columns))
    taken = best_columns(energy, rows, budget, cost)
    spent = cost.total(rows, taken.sum(1))
    assert spent <= budget * (1 + 1e-12)
    rate = energy.double() / cost.per_column(rows)[:, None]
    if not taken.all():
        rate_left = rate.masked_fill(taken, -1).flatten()
        assert not taken.any() or rate_left.max() <= rate[taken].min()
        assert spent + cost.per_column(rows)[int(rate_left.argmax()) // columns] > budget
        assert not plain or price(energy, rows, budget) == pytest.approx(float(rate_left.max()))


def test_a_group_that_does_not_pay_for_its_start_is_left_out() -> None:
    energy = torch.tensor([[10.0, 9.0, 0.0], [5.0, 0.1, 0.1]])
    rows, cost = torch.tensor([16, 16]), Cost(overhead_columns=3.0)
    one, both = cost(16, 2), cost(16, 2) + cost(16, 1)
    assert best_columns(energy, rows, one, cost).tolist() == [[True, True, False], [False, False, False]]
    assert best_columns(energy, rows, both - 1, cost).sum() == 2
    assert cost(16, 0) == 0
    assert cost(17, 10) == 32 * (10 + 3)
    assert cost(16, 10) == pytest.approx(1.03 * 16 * 13)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_only_the_proportions_of_weights_count(scale: float) -> None:
    weight, mask = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)), torch.ones(64, 40)
    want = partition({"w": weight}, {"w": mask}, density=0.2, group_rows=16)
    assert partition({"w": weight * scale}, {"w": mask}, density=0.2, group_rows=16).masks == want.masks


def test_weights_that_are_all_zero_are_grouped_by_their_mask() -> None:
    mask = torch.eye(2).repeat_interleave(16, 0)
    found = partition({"w": torch.zeros(32, 2)}, {"w": mask}, group_rows=16)
    assert torch.equal(found.masks["w"], mask.bool())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_rows": 0}, InputError, r"group_rows 0: expected a positive number of rows; got 0\.\n  32 or 64 suit"),
        (
            {"density": 1.5},
            InputError,
            r"density 1\.5: expected a fraction of weights to keep.*; got 1\.5\.\n  density",
        ),
        (
            {"density": {"v": 0.5}},
            MaskError,
            r"density of 'v': expected the name of one of the masks; got .*\.\n  Leave",
        ),
    ],
)
def test_options_outside_their_range_are_refused(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        partition({"w": torch.ones(2, 2)}, {"w": torch.eye(2)}, **options)


def test_the_largest_layers_of_resnet_50_take_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, 3, 3, generator=generator)
    found = partition({"w": weight}, {"w": weight.abs() > 1.6}, sweeps=4)
    assert found.layers[0].groups == 16


@pytest.mark.parametrize(("masks", "rows"), [("imp", 32), ("erk_large", 32)])
def test_on_weights_like_trained_ones_much_more_is_kept_than_by_shuffled_blocks(masks: str, rows: int) -> None:
    shapes = {"a": (128, 64, 3, 3), "b": (256, 128, 1, 1), "c": (64, 256, 1, 1)}
    generator = torch.Generator().manual_seed(0)
    weights = {n: compare_partitioners.make_weight(torch.Size(s), "trained", generator) for n, s in shapes.items()}
    given = compare_partitioners.make_masks(weights, masks, 0.8)
    theirs = shuffled_block(weights, given, block=rows)
    ours = partition(weights, given, density={x.name: x.density_after for x in theirs.layers}, group_rows=rows)
    for before, after in zip(theirs.layers, ours.layers, strict=True):
        assert after.density_after <= before.density_after
        assert after.l2_kept > 1.05 * before.l2_kept or before.density_before > 0.4
        assert after.l2_kept > before.l2_kept


def test_the_table_in_the_documents_is_the_committed_rows_and_every_row_says_where_it_comes_from() -> None:
    text = (compare_partitioners.ROOT / "docs" / "coarsening.md").read_text(encoding="utf-8")
    shown = text.split("<!-- rows: begin -->")[1].split("<!-- rows: end -->")[0].strip()
    rows = [json.loads(line) for line in compare_partitioners.ROWS.read_text(encoding="utf-8").splitlines()]
    assert shown == compare_partitioners.table(rows)
    for row in rows:
        assert all(row[key] for key in ("machine", "versions", "commit", "date", "command"))
        assert row["density_ours"] <= row["density"]
        assert row["partition_w2"] > row["rule_w2"]


@pytest.mark.parametrize("name", ["n_m", "partition", "refill", "refill_plus", "regroup", "shuffled_block"])
def test_a_model_is_not_its_weights(name: str) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        InputError, match="weights: expected a dict of weights by parameter name; got a Sequential"
    ) as e:
        getattr(coarsen, name)(model, {"0.weight": torch.ones(8, 8)})
    assert "prunable(model)" in e.value.do
