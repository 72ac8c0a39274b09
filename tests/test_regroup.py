"""Regroup: the released rule against a plain transcription, and the rule that weighs costs."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.coarsen import Cost, regroup
from fxsparse.coarsen.cluster import PARTITIONERS, clusters, complete_linkage, jaccard
from fxsparse.coarsen.regroup import tiled
from fxsparse.coarsen.released import released_blocks
from fxsparse.errors import InputError
from tests.coarsening import DEGENERATE, check, layers

Given = tuple[dict[str, Tensor], dict[str, Tensor]]
INSTALLED = [p for p in PARTITIONERS if p != "mtkahypar"]


def transcription(m: list[list[int]], found: list[list[int]], t1: float, nn: int, b2: int) -> list[list[int]]:
    """The released loop, one element at a time; the new mask, or the given one when there is no block."""
    ncols, blocks = len(m[0]), []
    for r in found:
        nnz_cols = [sum(m[row][i] for row in r) for i in range(ncols)]
        cc = sorted(range(ncols), key=lambda x: nnz_cols[x], reverse=True)
        nnz_rows = [sum(m[row]) for row in r]
        for i in range(1, ncols):
            flag = False
            for j in range(len(r)):
                if m[r[j]][i] != 0:
                    nnz_rows[j] -= 1
                if i <= t1 * nnz_rows[j]:
                    flag = True
                    break
            if not flag:
                if len(r) > nn:
                    blocks.append((r[: len(r) // nn * nn], cc[:i]))
                    blocks.append((r[len(r) // nn * nn :], cc[:i]))
                elif len(r) > b2:
                    blocks.append((r, cc[:i]))
                break
    new = [[0] * ncols for _ in m]
    for rows, columns in blocks:
        for row in rows:
            for column in columns:
                new[row][column] = 1
    return new if blocks else m


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 80), st.integers(1, 40), st.floats(0.02, 0.9), st.integers(1, 6), st.integers(0, 2**32),
       st.sampled_from([(1.5, 32, 16), (1.0, 4, 2), (1.3, 7, 3)]))  # fmt: skip
def test_the_released_rule_is_the_released_loop(
    rows: int, columns: int, density: float, parts: int, seed: int, options: tuple[float, int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density * torch.rand(columns, generator=generator) * 2
    mask = mask[mask.any(1)]
    labels = torch.randint(parts, (len(mask),), generator=generator)
    found = [(labels == label).nonzero().flatten() for label in range(parts) if bool((labels == label).any())]
    t1, nn, b2 = options
    blocks, _ = released_blocks(mask, found, nn, b2, t1)
    got = mask.clone() if blocks is None else torch.zeros_like(mask)
    for block in blocks or ():
        got[block.rows[:, None], block.columns] = True
    if len(mask):
        want = transcription(mask.int().tolist(), [rows.tolist() for rows in found], t1, nn, b2)
        assert torch.equal(got, torch.tensor(want, dtype=torch.bool))


def test_the_released_rule_on_a_model_layer_is_the_transcription_on_its_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 8, 3, 3, generator=generator) * torch.rand(256, 8, 1, 1, generator=generator)
    mask = weight.abs() > 0.7
    found = check(lambda w, m: regroup(w, m, rule="released"), {"w": weight}, {"w": mask})
    bits = mask.flatten(1)
    alive = bits.any(1).nonzero().flatten()
    parts = [alive[rows].tolist() for rows in clusters(bits[alive], bits[alive].float(), 8, "metis")]
    want = transcription(bits.int().tolist(), parts, 1.5, 32, 16)
    assert torch.equal(found.masks["w"].flatten(1), torch.tensor(want, dtype=torch.bool))
    assert not torch.equal(found.masks["w"], mask)


def test_the_released_rule_says_what_it_dropped_and_what_it_left_unstructured() -> None:
    mask = torch.rand(64, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    found = regroup({"w": torch.ones(64, 30)}, {"w": mask}, rule="released")
    assert torch.equal(found.masks["w"], mask)
    assert found.layers[0].fallback == "kept as it was, unstructured: no block; 64 rows in clusters of at most 16"
    dense = regroup({"w": torch.ones(64, 30)}, {"w": torch.ones(64, 30)}, rule="released", parts=2)
    assert "64 rows in clusters whose rows ask for every column" in dense.layers[0].fallback
    mask = torch.zeros(40, 30)
    mask[:30, :5] = 1
    mask[30:, 10:12] = 1
    found = regroup({"w": torch.ones(40, 30)}, {"w": mask}, rule="released", parts=2, partitioner="hierarchical")
    assert found.layers[0].fallback == "10 rows in clusters of at most 16: dropped whole"
    assert not found.masks["w"][30:].any()


@settings(max_examples=25, deadline=None)
@given(layers(), st.sampled_from(["released", "cost"]), st.sampled_from(INSTALLED))
def test_rows_of_a_group_share_one_list_of_columns(layer: Given, rule: str, partitioner: str) -> None:
    found = check(lambda w, m: regroup(w, m, rule=rule, partitioner=partitioner), *layer)
    if rule == "cost":
        assert not any(each.fallback for each in found.layers)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("rule", ["released", "cost"])
@pytest.mark.parametrize("partitioner", INSTALLED)
def test_degenerate_masks_are_no_trouble(kind: str, rule: str, partitioner: str) -> None:
    mask = DEGENERATE[kind]
    found = regroup({"w": torch.ones(mask.shape)}, {"w": mask}, rule=rule, partitioner=partitioner)
    assert kind != "all zero" or not found.masks["w"].any()


@pytest.mark.parametrize("partitioner", INSTALLED)
def test_the_cost_rule_stays_within_the_cost_of_the_masks_own_weights(partitioner: str) -> None:
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(5))
    mask, cost = weight.abs() > 1.3, Cost()
    found = regroup({"w": weight}, {"w": mask}, partitioner=partitioner)
    spent = sum(cost(len(group.rows), len(group.columns)) for group in found.groups["w"])
    assert 0.9 * (int(mask.sum()) + 24 * 200) < spent <= int(mask.sum()) + 24 * 200
    assert found.layers[0].groups >= 7


def test_small_layers_get_blocks_too() -> None:
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(5))
    found = regroup({"w": weight}, {"w": weight.abs() > 1.3})
    assert found.layers[0].groups in (2, 4)
    assert found.layers[0].fallback == ""


def test_a_dearer_start_of_a_group_leads_to_larger_groups() -> None:
    weight = torch.randn(128, 300, generator=torch.Generator().manual_seed(5))
    mask = weight.abs() > 1.3
    sizes = [
        max(len(group.rows) for group in regroup({"w": weight}, {"w": mask}, cost=cost).groups["w"])
        for cost in (Cost(narrow=1.0), Cost(narrow=2.0))
    ]
    assert sizes == [16, 32]


@pytest.mark.parametrize("seed", range(5))
def test_complete_linkage_is_scipys(seed: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = torch.rand(40, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = (distance + distance.T).fill_diagonal_(0)
    condensed = distance.numpy()[torch.triu_indices(40, 40, 1).unbind()]
    for parts in (1, 2, 7, 39, 40):
        labels = complete_linkage(distance, parts)
        want = torch.from_numpy(hierarchy.fcluster(hierarchy.linkage(condensed, "complete"), parts, "maxclust"))
        assert len(labels.unique()) == parts
        assert torch.equal(labels[:, None] == labels, want[:, None] == want)


def test_jaccard_is_the_share_of_common_columns() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert jaccard(mask).tolist() == [[1, pytest.approx(1 / 3), 0], [pytest.approx(1 / 3), 1, 0], [0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32))
def test_clusters_become_groups_of_exact_sizes(rows: int, tile: int, parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(parts, (rows,), generator=generator)
    found = sorted(((labels == p).nonzero().flatten() for p in range(parts)), key=lambda rows: -len(rows))
    sizes = torch.tensor([tile] * (rows // tile) + [rows % tile] * (rows % tile > 0))
    got = tiled(found, torch.rand(rows, 3, generator=generator), sizes)
    assert got.bincount(minlength=len(sizes)).tolist() == sizes.tolist()


def test_clusters_that_fit_are_kept_whole() -> None:
    labels = torch.arange(4).repeat(8)
    found = [(labels == p).nonzero().flatten() for p in range(4)]
    got = tiled(found, torch.rand(32, 3), torch.tensor([8] * 4))
    assert all(len(got[rows].unique()) == 1 for rows in found)


@pytest.mark.parametrize(("partitioner", "package"), [("metis", "pymetis"), ("mtkahypar", "mtkahypar")])
def test_a_missing_package_is_named(partitioner: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    message = rf"partitioner '{partitioner}': expected the package {package}; got a machine without it\.\n  pip install"
    with pytest.raises(InputError, match=message):
        regroup({"w": torch.ones(64, 4)}, {"w": torch.ones(64, 4)}, partitioner=partitioner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paper"}, r"rule 'paper': expected one of 'released', 'cost'; got 'paper'\.\n  'cost' weighs"),
        ({"parts": 0}, r"parts 0: expected a positive number of clusters; got 0\.\n  The released code has 8"),
        ({"row_tile": 0}, r"row_tile 0: expected a positive number of rows; got 0\.\n  32 or 64"),
        ({"min_rows": -1}, r"min_rows -1: expected a positive number of rows; got -1\.\n  32 or 64"),
        ({"column_ratio": 0}, r"column_ratio 0: expected a positive ratio; got 0\.\n  The released code has 1\.5"),
        (
            {"partitioner": "metric"},
            r"partitioner 'metric': expected one of .*; got 'metric'\.\n  Did you mean 'metis'",
        ),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        regroup({"w": torch.ones(2, 2)}, {"w": torch.eye(2)}, **options)
