"""Small models, each the whole of one difficulty: what must go, what must stay, and the function unchanged.

Every case: float64, equality with the zeroed module within 1e-10 at several batch and image sizes, a second run of
every pass accepts nothing, and the shapes that are left.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse import Masks
from fxsparse.passes import PIPELINE, Context

SEED = 20261123


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(SEED)


def zero(model: nn.Module, **rows: object) -> nn.Module:
    """`zero(m, a__weight=[0, 1])` zeroes rows 0 and 1 of a.weight; a (slice, [..]) pair zeroes columns."""
    with torch.no_grad():
        for name, index in rows.items():
            model.get_parameter(name.replace("__", "."))[index] = 0
    return model


def alive(model: nn.Module) -> nn.Module:
    """Random batch norm statistics and biases, all far from 0."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
                m.weight.uniform_(0.5, 1.5)
                m.bias.uniform_(0.2, 1.0)
            elif getattr(m, "bias", None) is not None:
                m.bias.uniform_(0.2, 1.0)
    return model


def shapes_after(
    model: nn.Module,
    size: tuple[int, ...],
    expected: Mapping[str, tuple[int, ...]],
    *,
    sizes: tuple[tuple[int, ...], ...] = (),
    masks: Masks | None = None,
) -> fxsparse.SparseModule:
    model = model.double().eval()
    reference = copy.deepcopy(model)
    if masks is not None:
        masks.apply_(reference)
    for shape in (size, *sizes):
        fast = fxsparse.compile(
            model, masks, target="eager", example_inputs=torch.randn(2, *shape).double(), verify="each", measure=False
        )
        for batch in (1, 5):
            x = torch.randn(batch, *shape).double()
            with torch.no_grad():
                torch.testing.assert_close(fast(x), reference(x), rtol=1e-10, atol=1e-10)
        left = {row.name: row.new_shape[: len(expected.get(row.name, ()))] for row in fast.report.rows}
        assert {n: left[n] for n in expected} == dict(expected)
        again = [d for step in PIPELINE for d in step.plan(fast.graph_module, Context()) if d.accepted]
        assert again == []
    return fast


def conv(i: int, o: int, k: int = 3, **kw: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **{"padding": k // 2, **kw})


def test_dead_rows_go_with_their_readers_columns() -> None:
    m = nn.Sequential(conv(3, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8))
    alive(m)
    zero(m, **{"0__weight": slice(0, 6), "1__bias": slice(0, 6), "1__weight": slice(0, 6)})
    shapes_after(m, (3, 7, 6), {"0.weight": (10, 3), "3.weight": (8, 10)})


def test_constants_fold_into_the_bias_where_nothing_is_padded() -> None:
    m = alive(nn.Sequential(conv(3, 16, padding=0), nn.ReLU(), conv(16, 8, padding=0)))
    shapes_after(zero(m, **{"0__weight": slice(0, 6)}), (3, 9, 8), {"0.weight": (10, 3), "2.weight": (8, 10)})


def test_one_carrier_stands_for_all_constants_before_zero_padding() -> None:
    m = alive(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 8)))
    fast = shapes_after(
        zero(m, **{"0__weight": slice(0, 6)}), (3, 13, 14), {"0.weight": (11, 3), "2.weight": (8, 11)},
        sizes=((3, 2, 5), (3, 1, 1)),
    )  # fmt: skip
    assert any("carrier" in reason for row in fast.report.rows for reason in row.kept_for)
    assert any("carry 6 constant columns" in d.what for d in fast.report.decisions)


def test_folding_a_padded_constant_as_if_there_were_no_border_would_be_noticed() -> None:
    """The check that the carrier exists for: the naive fold differs by much more than any tolerance here."""
    m = alive(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 8))).double().eval()
    zero(m, **{"0__weight": slice(0, 6)})
    naive = copy.deepcopy(m)
    with torch.no_grad():
        constant = torch.relu(m[0].bias[:6])
        naive[2].bias += (m[2].weight[:, :6].sum((2, 3)) * constant).sum(1)
        naive[2].weight[:, :6] = 0
        x = torch.randn(1, 3, 13, 14).double()
        assert (naive(x) - m(x)).abs().max() > 1e-3


def test_a_masked_gamma_leaves_the_activation_of_beta() -> None:
    m = alive(nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.SiLU(), conv(16, 8, 1)))
    shapes_after(zero(m, **{"1__weight": slice(0, 5)}), (3, 6, 6), {"0.weight": (11, 3), "3.weight": (8, 11)})


def test_columns_that_nobody_reads_take_their_rows_along() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(16, 4), conv(16, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.a(x))
            return torch.cat([self.b(y), self.c(y)], 1)

    m = alive(TwoReaders())
    zero(m, b__weight=(slice(None), slice(0, 8)), c__weight=(slice(None), slice(4, 12)))
    shapes_after(m, (3, 5, 5), {"a.weight": (12, 3), "b.weight": (4, 12), "c.weight": (5, 12)})


def test_a_row_dies_only_after_the_columns_it_reads() -> None:
    m = nn.Sequential(conv(3, 8, bias=False), nn.ReLU(), conv(8, 6, bias=False), nn.ReLU(), conv(6, 2, bias=False))
    zero(m, **{"0__weight": slice(0, 3), "2__weight": (slice(0, 2), slice(3, 8))})
    shapes_after(m, (3, 5, 5), {"0.weight": (5, 3), "2.weight": (4, 5), "4.weight": (2, 4)})


@pytest.mark.parametrize("value", ["sum is zero", "1e-30", "one -0.0"])
def test_nothing_goes_because_it_looks_like_zero(value: str) -> None:
    m = nn.Sequential(conv(1, 4, bias=False), nn.ReLU(), conv(4, 3, bias=False)).double()
    with torch.no_grad():
        if value == "sum is zero":
            m[0].weight[0, 0] = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        elif value == "1e-30":
            m[0].weight[0] = 1e-30
        else:
            m[0].weight[0, 0, 0, 0] = -0.0
    shapes_after(m, (1, 6, 6), {"0.weight": (4, 1), "2.weight": (3, 4)})


def test_a_row_of_negative_zeros_is_a_zero_row() -> None:
    """torch.nn.utils.prune leaves -0.0 for every negative weight: weight * mask."""
    m = nn.Sequential(conv(1, 4, bias=False), nn.ReLU(), conv(4, 3, bias=False))
    with torch.no_grad():
        m[0].weight[0] = -0.0
    shapes_after(m, (1, 6, 6), {"0.weight": (3, 1), "2.weight": (3, 3)})


class Residual(nn.Module):
    """Two blocks on one trunk."""

    def __init__(self, width: int = 12, norm: bool = False) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.a1, self.a2 = conv(width, 10), conv(10, width)
        self.b1, self.b2 = conv(width, 10), conv(10, width)
        self.head = conv(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.a2(torch.relu(self.a1(x))))
        x = torch.relu(x + self.b2(torch.relu(self.b1(x))))
        return self.head(x)


def dead(model: nn.Module, rows: Mapping[str, object]) -> nn.Module:
    for name, index in rows.items():
        zero(model, **{f"{name}__weight": index, f"{name}__bias": index})
    return model


def test_channels_dead_in_every_branch_leave_the_trunk() -> None:
    m = dead(alive(Residual()), {n: slice(0, 4) for n in ("stem", "a2", "b2")})
    shapes_after(
        m, (3, 6, 5), {"stem.weight": (8, 3), "a1.weight": (10, 8), "b2.weight": (8, 10), "head.weight": (4, 8)}
    )


def test_a_channel_that_one_branch_needs_stays_in_all_and_says_so() -> None:
    m = dead(alive(Residual()), {"stem": slice(0, 6), "a2": slice(2, 8), "b2": slice(4, 10)})
    fast = shapes_after(m, (3, 6, 5), {"stem.weight": (10, 3), "a2.weight": (10, 10), "b2.weight": (10, 10)})
    reasons = {row.name: " ".join(row.kept_for) for row in fast.report.rows}
    assert "coupled with" in reasons["stem.weight"]


def test_a_dead_branch_goes_as_a_whole() -> None:
    m = alive(Residual())
    zero(m, a2__weight=slice(None))
    with torch.no_grad():
        m.a2.bias.zero_()
    fast = shapes_after(m, (3, 6, 5), {"a1.weight": (0, 12), "a2.weight": (0, 10)})
    assert sum("add" in str(n.target) for n in fast.graph_module.graph.nodes) == 1


def test_a_constant_branch_becomes_a_constant() -> None:
    fast = shapes_after(
        zero(alive(Residual()), a2__weight=slice(None)), (3, 6, 5), {"a1.weight": (0, 12), "a2.weight": (0, 10)}
    )
    assert any("replace what a2 gives by a constant" in d.what for d in fast.report.decisions)


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 7), conv(3, 9), conv(7, 5)
        self.norm, self.out = nn.BatchNorm2d(21), conv(21, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        return self.out(torch.relu(self.norm(torch.cat([torch.cat([a, self.b(x)], 1), self.c(a)], 1))))


def test_concatenated_channels_go_where_they_came_from() -> None:
    m = dead(alive(Cat()), {"a": [0, 3], "b": slice(0, 4), "c": [4]})
    zero(m, norm__bias=[0, 3, 7, 8, 9, 10, 20], norm__weight=[0, 3, 7, 8, 9, 10, 20])
    shapes_after(m, (3, 6, 5), {"a.weight": (5, 3), "b.weight": (5, 3), "c.weight": (4, 5), "out.weight": (4, 14)})


def test_constants_through_a_norm_behind_a_concatenation_need_one_carrier() -> None:
    m = dead(alive(Cat()), {"a": [0, 3], "b": slice(0, 4), "c": [4]})
    shapes_after(m, (3, 6, 5), {"out.weight": (4, 15)}, sizes=((3, 2, 3),))


def test_a_wholly_dead_part_of_a_concatenation_goes() -> None:
    m = dead(alive(Cat()), {"b": slice(None)})
    zero(m, norm__bias=slice(7, 16), norm__weight=slice(7, 16))
    shapes_after(m, (3, 6, 5), {"b.weight": (0, 3), "out.weight": (4, 12)})


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 12), conv(6, 6), conv(6, 6), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        p, q = torch.relu(self.a(x)).chunk(2, 1)
        return self.d(torch.cat([self.b(p), self.c(q)], 1))


def test_chunks_may_become_unequal() -> None:
    shapes_after(
        dead(alive(Chunks()), {"a": [0, 7, 8, 9]}), (3, 5, 5),
        {"a.weight": (8, 3), "b.weight": (6, 5), "c.weight": (6, 3)},
    )  # fmt: skip


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 12), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        return self.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def test_a_channel_shuffle_is_cut_in_rectangles() -> None:
    fast = shapes_after(dead(alive(Shuffle()), {"a": [0, 6, 1]}), (3, 4, 4), {"a.weight": (10, 3), "b.weight": (4, 10)})
    (row,) = [r for r in fast.report.rows if r.name == "a.weight"]
    assert "coupled by view (1 row)" in " ".join(row.kept_for).replace("(a)", "") or "coupled" in " ".join(row.kept_for)


def test_pixel_shuffle_keeps_whole_sets() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 16), conv(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.pixel_shuffle(self.a(x), 2))

    shapes_after(dead(alive(Up()), {"a": [0, 1, 2, 3, 9]}), (3, 4, 5), {"a.weight": (12, 3), "b.weight": (2, 3)})


def test_groups_stay_whole_or_go_whole() -> None:
    m = alive(nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, groups=4), nn.ReLU(), conv(8, 3, 1)))
    dead(m, {"0": [0, 1, 2, 4], "2": [0, 1, 5]})
    fast = shapes_after(m, (3, 5, 5), {"0.weight": (9, 3), "2.weight": (6, 3), "4.weight": (3, 6)})
    assert any("a group stays whole" in reason for row in fast.report.rows for reason in row.kept_for)


def test_depthwise_channels_go_with_their_expansion() -> None:
    m = nn.Sequential(conv(3, 12, 1), nn.ReLU6(), conv(12, 12, groups=12), nn.ReLU6(), conv(12, 5, 1))
    dead(alive(m), {"0": [0, 1, 2], "2": [2, 3, 4]})
    zero(m, **{"2__bias": [0, 1]})
    shapes_after(m, (3, 5, 5), {"0.weight": (7, 3), "2.weight": (7, 1), "4.weight": (5, 7)})


def test_a_depthwise_bias_behind_a_dead_input_folds_into_the_next_layer() -> None:
    m = nn.Sequential(conv(3, 12, 1), nn.ReLU6(), conv(12, 12, groups=12), nn.ReLU6(), conv(12, 5, 1))
    shapes_after(dead(alive(m), {"0": [0, 1, 2]}), (3, 5, 5), {"0.weight": (9, 3), "4.weight": (5, 9)})


def test_a_constant_under_a_padded_depthwise_convolution_differs_at_the_border_and_stays() -> None:
    m = nn.Sequential(conv(3, 12, 1), nn.ReLU6(), conv(12, 12, groups=12), nn.ReLU6(), conv(12, 5, 1))
    fast = shapes_after(zero(alive(m), **{"0__weight": [0, 1, 2]}), (3, 5, 5), {"0.weight": (12, 3)})
    (row,) = [r for r in fast.report.rows if r.name == "4.weight"]
    assert row.blocked_by is not None
    assert "differ over positions" in row.blocked_by


def test_flattened_channels_die_when_all_their_columns_do() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 6), nn.Linear(6 * 4 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).flatten(1))

    m = zero(alive(Flat()), b__weight=(slice(None), slice(0, 16 + 10)))
    shapes_after(m, (3, 4, 4), {"a.weight": (5, 3), "b.weight": (5, 80)})
    m = zero(alive(Flat()), a__weight=[1, 2])  # constants: every column is folded by itself
    shapes_after(m, (3, 4, 4), {"a.weight": (4, 3), "b.weight": (5, 64)})


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.excite, self.b = conv(3, 8), conv(8, 4, 1), conv(4, 8, 1), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))))


def test_a_dead_gated_channel_takes_its_gate_along() -> None:
    m = dead(alive(Gate()), {"a": [0, 5], "squeeze": [1]})
    expected = {"a.weight": (6, 3), "squeeze.weight": (3, 6), "excite.weight": (6, 3), "b.weight": (3, 6)}
    shapes_after(m, (3, 5, 4), expected)


def test_a_dead_gate_is_a_half_and_the_channel_stays() -> None:
    shapes_after(dead(alive(Gate()), {"excite": [0, 5]}), (3, 5, 4), {"a.weight": (8, 3), "b.weight": (3, 8)})


def test_a_mean_over_channels_keeps_its_divisor() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).mean(1)

    shapes_after(dead(alive(Mean()), {"a": [0, 1, 2]}), (3, 5, 4), {"a.weight": (8, 3)})


def test_padded_pools_know_their_border() -> None:
    m = nn.Sequential(conv(3, 8), nn.AvgPool2d(3, 2, 1), conv(8, 4, 1), nn.MaxPool2d(3, 2, 1), conv(4, 2, 1))
    alive(m)
    with torch.no_grad():
        m[2].bias.neg_()
    zero(m, **{"0__weight": [0, 1], "2__weight": [3]})
    shapes_after(m, (3, 9, 8), {"2.weight": (3, 8), "4.weight": (2, 3)})


def test_a_shared_convolution_is_cut_at_each_use_by_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shared, self.out = conv(3, 8), conv(3, 8), conv(8, 6), conv(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.shared(self.a(x)), self.shared(self.b(x))], 1))

    fast = shapes_after(
        dead(alive(Twice()), {"a": [0, 1], "b": [3]}), (3, 5, 4), {"a.weight": (6, 3), "b.weight": (7, 3)}
    )
    shared = sorted(r.new_shape[1] for r in fast.report.rows if r.name == "shared.weight")
    assert shared == [6, 7]


@pytest.mark.parametrize("which", ["first", "last", "all"])
def test_everything_masked_gives_a_constant_output(which: str) -> None:
    m = alive(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(8 * 5 * 4, 3)))
    names = {"first": ["0"], "last": ["4"], "all": ["0", "2", "4"]}[which]
    masks = Masks({f"{n}.weight": torch.zeros_like(m.get_parameter(f"{n}.weight")) for n in names})
    shapes_after(m, (3, 5, 4), {}, masks=masks)


def test_dead_logits_stay_because_the_signature_does() -> None:
    m = alive(nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    fast = shapes_after(dead(m, {"3": [1, 2]}), (3, 5, 4), {"3.weight": (5, 8)})
    assert any("output signature" in reason for row in fast.report.rows for reason in row.kept_for)


def test_structured_outputs_keep_their_structure() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), conv(8, 3), conv(8, 2)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, object]:
            y = torch.relu(self.a(x)) * scale
            return {"boxes": self.b(y), "rest": (self.c(y), y.mean())}

    m = dead(alive(Heads()), {"a": [0, 1]}).double().eval()
    x, scale = torch.randn(2, 3, 5, 5).double(), torch.randn(2, 8, 1, 1).double()
    fast = fxsparse.compile(m, target="eager", example_inputs=(x, scale), measure=False)
    torch.testing.assert_close(fast(x, scale), m(x, scale), rtol=1e-10, atol=1e-12)


def test_weights_behind_a_parametrization_are_found() -> None:
    m = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    alive(m)
    with torch.no_grad():
        m[0].parametrizations.weight.original0[:3] = 0
        m[0].bias[:3] = 0
    fast = shapes_after(m, (6,), {"2.weight": (3, 5)})
    assert fast(torch.randn(1, 6).double()).shape == (1, 3)


def test_a_mask_removes_even_a_weight_that_is_not_a_number() -> None:
    m = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[1] = False
    with torch.no_grad():
        m[0].weight[1] = float("nan")
        m[0].bias[1] = 0
    shapes_after(m, (4,), {"0.weight": (4, 4), "2.weight": (2, 4)}, masks=Masks({"0.weight": mask}))


def test_transformer_mlps_shrink_and_the_rest_stays() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu", dropout=0.1)
    with torch.no_grad():
        layer.linear1.weight[:10] = 0
        layer.linear1.bias[:10] = 0
    shapes_after(layer, (7, 16), {"linear1.weight": (22, 16), "linear2.weight": (16, 22)})


def two_linears(between: Callable[[Tensor], Tensor], n: int = 8) -> nn.Module:
    """Linear(5, 8) with half of its rows dead -> `between` -> Linear(n, 3)."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(n, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(between(self.a(x)))

    return zero(Two(), a__weight=slice(0, 4))


@pytest.mark.parametrize(
    ("between", "n"),
    [
        (lambda y: torch.relu(y).sum(0, keepdim=True), 8),
        (lambda y: y.cumsum(0), 8),
        (lambda y: torch.linalg.vector_norm(y, dim=0, keepdim=True), 8),
        (lambda y: torch.cat([y, torch.full((y.shape[0], 1), 1.0, dtype=y.dtype) * y.shape[0]], 1), 9),
        (lambda y: y.T @ y, 8),
        (lambda y: y[:, torch.tensor([7, 0, 1])], 3),
        (lambda y: y - torch.tensor([0.5, 1, 1, 1, 1, 1, 1, 1], dtype=y.dtype), 8),
    ],
    ids=["sum", "cumsum", "norm", "size", "gram", "index", "constant"],
)
def test_what_depends_on_the_batch_or_is_made_in_forward_is_right_at_any_batch_size(
    between: Callable[[Tensor], Tensor], n: int
) -> None:
    shapes_after(two_linears(between, n), (5,), {})


def test_weights_computed_at_run_time_are_not_taken_for_constants() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 3, 3, 3))
            self.c, self.d = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
            self.bn, self.out = nn.BatchNorm2d(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(F.conv2d(x, self.w, self.c * x.mean()))
            y = F.batch_norm(y, self.c, self.c, self.d * x.sum(), self.c * x.mean())
            y = F.layer_norm(y.mean((2, 3)), (6,), self.c * x.mean(), self.d * x.sum())
            return F.linear(torch.relu(self.out(y)), self.w[:2, 0, 0, :2], x.mean() + self.c[:2])

    shapes_after(zero(alive(Computed()), w=[0, 1, 2]), (3, 5, 5), {})
    shapes_after(zero(alive(Computed()), w=slice(None)), (3, 5, 5), {})


def test_zero_times_infinity_is_not_zero() -> None:
    m = zero(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), **{"0__weight": [0], "0__bias": [0]})
    with torch.no_grad():
        m[2].weight[0, 0] = float("inf")
    m = m.double().eval()
    x = torch.randn(2, 5).double()
    fast = fxsparse.compile(m, target="eager", example_inputs=x, measure=False)
    assert fast(x)[:, 0].isnan().all()
    torch.testing.assert_close(fast(x)[:, 1], m(x)[:, 1])


@pytest.mark.parametrize("shape", [(8, 1, 1), ()], ids=str)
def test_layer_scale_shrinks_with_its_channels(shape: tuple[int, ...]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g, self.b = conv(3, 8), nn.Parameter(torch.rand(shape) + 1), conv(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.g)

    shapes_after(dead(alive(Scaled()), {"a": [0, 1]}), (3, 4, 4), {"a.weight": (6, 3), "b.weight": (2, 6)})


@pytest.mark.parametrize(
    ("between", "n"),
    [
        (lambda y: y * F.pad(y[:, :0], (0, 8), value=2.0), 8),
        (lambda y: torch.cat([y, torch.cat([y[:, :0], y[:, 8:]], 1)], 1), 8),
        (lambda y: y + torch.cat([torch.zeros(0, dtype=y.dtype), y[:, :0]], 1).sum(1, keepdim=True), 8),
    ],
    ids=["padded", "joined", "of another rank"],
)
def test_a_slice_of_size_0_holds_nothing(between: Callable[[Tensor], Tensor], n: int) -> None:
    shapes_after(two_linears(between, n), (5,), {})


# ------------------------------------------------------------ paths

WRITERS: dict[str, Any] = {
    "save": lambda fast, path: fast.save(path),
    "save_aoti": lambda fast, path: fast.save_aoti(path),
    "export_onnx": fxsparse.export_onnx,
    "masks": lambda fast, path: fxsparse.Masks({}).save(path),
}


@pytest.fixture(scope="module")
def small() -> fxsparse.SparseModule:
    model = nn.Linear(4, 4).eval()
    return fxsparse.compile(model, target="eager", measure=False, example_inputs=(torch.randn(1, 4),))


@pytest.mark.parametrize("path", ["", "a\0b", None, 3])
def test_what_names_no_file_is_refused_in_four_parts(small: fxsparse.SparseModule, path: Any) -> None:
    for use in (*WRITERS.values(), lambda _, path: fxsparse.load(path), lambda _, path: fxsparse.read(path)):
        with pytest.raises(fxsparse.InputError, match=r"expected .*; got"):
            use(small, path)


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "save_aoti"])  # it refuses other suffixes first
def test_what_is_no_file_is_not_replaced(small: fxsparse.SparseModule, tmp_path: Path, writer: str) -> None:
    """Run by root, as in a container, a rename over /dev/null would take it from everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(fxsparse.InputError, match="no file"):
        WRITERS[writer](small, pipe)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "save_aoti"])
def test_a_symbolic_link_stays_and_its_file_is_replaced(
    small: fxsparse.SparseModule, tmp_path: Path, writer: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    WRITERS[writer](small, link)
    assert link.is_symlink()
    assert file.read_bytes() != b"old"
    assert list(file.parent.iterdir()) == [file]


def test_an_empty_batch_that_the_graph_cannot_take_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.LocalResponseNorm(3)).eval()
    fast = fxsparse.compile(model, target="eager", measure=False, example_inputs=(torch.randn(2, 8, 8, 8),))
    with pytest.raises(fxsparse.InputError, match="at least one sample"):
        fast(torch.randn(0, 8, 8, 8))


def test_a_linear_layer_on_one_sample_without_a_batch() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(16)
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:4] = False
    options: Any = {"target": "eager", "measure": False, "dynamic_batch": False}
    fast = fxsparse.compile(model, {"0.weight": mask}, example_inputs=(x,), **options)
    with torch.no_grad():
        model[0].weight.masked_fill_(~mask, 0)
        torch.testing.assert_close(fast(x), model(x))


class Of(nn.Module):
    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = forward, nn.ModuleDict(layers)

    def forward(self, *xs: Tensor) -> Any:
        return self.function(self.layers, *xs)


def without_rows(weight: Tensor, *dead: int) -> Tensor:
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[list(dead)] = False
    return mask


JUMPS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "ge": (0.7, lambda h: (h >= 0.7).float()), "eq": (0.1, lambda h: (h == 0.1).float()),
    "hardshrink": (0.1, lambda h: F.hardshrink(h, 0.1)), "floor": (0.7, lambda h: torch.floor(h * 10)),
    "int32": (0.35, lambda h: (h * 20).to(torch.int32).float()), "round": (0.35, lambda h: torch.round(h / 0.1) * 0.1),
    "argmax": (0.7, lambda h: h + h.argmax(-1, keepdim=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", JUMPS)
def test_a_constant_at_a_jump_is_on_the_side_where_the_model_has_it(name: str) -> None:
    """Facts are in float64, where float32's 0.7 is less than 0.7."""
    bias, jump = JUMPS[name]
    model = Of(lambda m, x: m["b"](jump(m["a"](x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model.layers["a"].bias[1] = bias
    masks = {"layers.a.weight": without_rows(model.layers["a"].weight, 1)}
    fast = fxsparse.compile(model, masks, "eager", example_inputs=(torch.randn(2, 4),), measure=False)
    Masks(masks).apply_(model)
    x = torch.randn(50, 4)
    with torch.no_grad():
        assert float((fast(x) - model(x)).abs().max()) < 1e-5


def test_a_factor_of_a_known_zero_stays_finite() -> None:
    """Its inputs are needed: made from a part of them it may overflow, and 0 * inf is not 0."""
    layers = {"f1": nn.Linear(4, 8), "f2": nn.Linear(8, 5), "z": nn.Linear(4, 5, bias=False)}
    model = Of(lambda m, x: m["z"](x) * torch.exp(m["f2"](torch.relu(m["f1"](x)))), **layers).eval()
    f1, f2, z = layers.values()
    with torch.no_grad():
        f1.weight[4:], f1.bias[4:] = f1.weight[:4], f1.bias[:4]
        f2.weight[4, :4], f2.weight[4, 4:] = 1, -1  # the two halves cancel in row 4, which a dead row multiplies
    half = torch.ones(5, 8, dtype=torch.bool)
    half[:4, 4:] = False
    masks = {"layers.f2.weight": half, "layers.z.weight": without_rows(z.weight, 4)}
    fast = fxsparse.compile(model, masks, "eager", example_inputs=(torch.randn(2, 4),), measure=False)
    assert torch.equal(fast(300 * torch.randn(6, 4))[:, 4], torch.zeros(6))


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda m, x: (m["b"](x) > 0) + m["a"](x), torch.float32),
        (lambda m, x: m["b"](x).half() + m["a"](x), torch.float32),
        (lambda m, x: m["c"](m["b"](x).half() - m["a"](x)), torch.float32),
        (lambda m, x: m["b"](x).double(), torch.float64),
        (lambda m, x: m["c"](m["a"](x).view(torch.int32).view(torch.float32)), torch.float32),
    ],
    ids=["bool", "half", "in between", "wider", "bits"],
)
def test_the_result_has_the_dtype_of_the_model(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    model = Of(function, a=nn.Linear(4, 6, bias=False), b=nn.Linear(4, 6), c=nn.Linear(6, 3)).eval()
    masks = {"layers.a.weight": torch.zeros(6, 4)}
    fast = fxsparse.compile(model, masks, "eager", example_inputs=(torch.randn(2, 4),), measure=False)
    assert fast(torch.randn(3, 4)).dtype == dtype


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_autocast_changes_nothing(target: str) -> None:
    """Neither around `compile`, nor around calls, nor around the first call with another batch size."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    masks, x = {"0.weight": without_rows(model[0].weight, 1)}, torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        fast = fxsparse.compile(model, masks, target, example_inputs=(x,), measure=False)
        inside = [fast(x), fast(x[:2])]
    Masks(masks).apply_(model)
    with torch.no_grad():
        for got, given in zip([*inside, fast(x), fast(x[:2])], [x, x[:2], x, x[:2]], strict=True):
            torch.testing.assert_close(got, model(given))


def test_floats_that_are_positions_in_a_table_keep_the_example_s_values() -> None:
    layers = {"e": nn.Embedding(9, 4), "a": nn.Linear(4, 3)}
    model = Of(lambda m, x: m["a"](m["e"](x[:, 0].long())), **layers)
    x = torch.tensor([[3.0, 1.0], [8.0, 2.0]])
    fast = fxsparse.compile(model, None, "eager", example_inputs=(x,), measure=False)
    assert "allowed" in fast.report.verification


def batch_norm_of_the_batch() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False)), torch.randn(1, 4)


def overflow() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).half()
    for layer in model:
        nn.init.constant_(layer.weight, 300.0)
    return model, torch.ones(2, 4).half()


def log_of_zero() -> tuple[nn.Module, Tensor]:
    model = Of(lambda m, x: m["b"](torch.log(torch.relu(m["a"](x)))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    with torch.no_grad():
        model.layers["b"].weight[:, 5] = 0
        model.layers["a"].bias.copy_(torch.tensor([9.0, 9.0, 9.0, 9.0, 9.0, -9.0]))
    return model, torch.randn(2, 4)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (batch_norm_of_the_batch, fxsparse.InputError, "inputs that the model itself runs on"),
        (overflow, fxsparse.VerificationError, "Use a dtype of a wider range"),
        (log_of_zero, fxsparse.VerificationError, r"0 \* inf is not kept where a mask has zeros"),
    ],
)
def test_what_the_model_itself_cannot_do_is_not_blamed_on_a_pass(
    make: Callable[[], tuple[nn.Module, Tensor]], error: type[Exception], words: str
) -> None:
    model, x = make()
    with pytest.raises(error, match=words):
        fxsparse.compile(model.eval(), None, "eager", example_inputs=(x,), measure=False)
