"""Shuffled blocks in standard operators, and gathers that are done before the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxsparse.backend.onnx import Onnx
from fxsparse.deploy import standard
from fxsparse.deploy.gathers import merge_gathers
from fxsparse.errors import TargetError
from fxsparse.formats import shuffled_block_aten as expanded
from fxsparse.formats.shuffled_block import ARRAYS, pack, unpack
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.ir.graph import clone, refresh
from fxsparse.kernels.shared import LANES


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).float()


def operator_graph(
    x: Tensor, weight: Tensor, *, activation: str, residual: bool, lanes: str = "rows", **geometry: Any
) -> fx.GraphModule:
    """y = op(x), as the pipeline leaves it, with shapes; the bias is 1, 2, 3 ..."""
    packed = pack(weight, lanes=lanes)
    gm, graph = nn.Module(), fx.Graph()
    tensors = dict(zip(ARRAYS, packed.tensors, strict=True)) | {"bias": torch.arange(1.0, len(weight) + 1)}
    for name, tensor in tensors.items():
        gm.register_buffer(f"w_{name}", tensor)
    node = graph.placeholder("x")
    stored = [graph.get_attr(f"w_{name}") for name in tensors]
    pairs = [geometry.get(name, default) for name, default in
             (("stride", [1, 1]), ("padding", [0, 0]), ("dilation", [1, 1]))]  # fmt: skip
    rest = (list(packed.shape), *pairs, activation, packed.lanes)
    first = graph.call_function(shuffled_block, (node, *stored, None, *rest))
    result = graph.call_function(shuffled_block, (node, *stored, first, *rest)) if residual else first
    graph.output((result,))
    module = fx.GraphModule(gm, graph)
    mode = torch._subclasses.FakeTensorMode()
    node.meta["val"] = mode.from_tensor(x)
    refresh(module)
    return module


def grouped_weight(rows: list[int], columns: list[int], shape: tuple[int, ...], *, whole: bool) -> Tensor:
    """Groups of these sizes; scattered rows. `whole`: columns are channels with all of their taps."""
    width, taps = shape[1], int(torch.tensor(shape[2:]).prod()) if shape[2:] else 1
    weight = torch.zeros(shape[0], width, taps)
    left = torch.randperm(shape[0]).tolist()
    for count, kept in zip(rows, columns, strict=True):
        own, left = left[:count], left[count:]
        mask = torch.zeros(width * taps, dtype=torch.bool)
        mask[torch.randperm(width * taps)[:kept]] = True
        if whole:
            mask = (torch.randperm(width) < kept)[:, None].expand(width, taps).flatten()
        weight[own] = (integers(count, width, taps).abs() + 1) * mask.view(width, taps)
    return weight.view(shape)


WINDOW = {"stride": [2, 1], "padding": [2, 0], "dilation": [1, 2]}
CASES = {
    "equal groups of whole channels": ([16, 16], [4, 4], (32, 16, 3, 3), True, {"padding": [1, 1]}),
    "taps of their own": ([16, 16], [30, 30], (32, 16, 3, 3), False, {"padding": [1, 1]}),
    "taps, strided": ([16, 16], [30, 32], (32, 16, 3, 3), False, WINDOW),
    "strided, dilated": ([16, 16], [4, 5], (32, 16, 3, 3), True, WINDOW),
    "unequal groups": ([20, 7, 3], [12, 2, 9], (30, 16, 1, 1), True, {}),
    "groups that are filled up": ([15, 15, 16], [7, 7, 7], (46, 16, 1, 1), True, {}),
    "linear, filled up": ([15, 15, 16], [9, 8, 9], (46, 20), False, {}),
    "rows in no group": ([8, 5], [3, 6], (20, 16, 1, 1), True, {}),
    "nothing at all": ([], [], (8, 16, 3, 3), True, {"padding": [1, 1]}),
    "kernel of one dimension": ([16, 16], [20, 20], (32, 16, 1, 5), False, {"padding": [0, 2]}),
    "linear": ([16, 16], [5, 5], (32, 20), False, {}),
    "linear, unequal groups and rows in none": ([9, 4, 3], [7, 2, 11], (19, 20), False, {}),
}  # fmt: skip


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", CASES)
def test_standard_operators_do_what_the_operator_does(case: str, residual: bool, lanes: str) -> None:
    rows, columns, shape, whole, geometry = CASES[case]
    weight = grouped_weight(rows, columns, shape, whole=whole)
    x = integers(2, 7, 9, shape[1]) if len(shape) == 4 else integers(2, 5, shape[1])
    gm = operator_graph(x, weight, activation="relu", residual=residual, lanes=lanes, **geometry)
    (theirs,), plain = gm(x), standard.standard(gm).gm
    assert all(n.target.namespace == "aten" for n in plain.graph.nodes if n.op == "call_function")
    permutes = sum(n.target is torch.ops.aten.permute.default for n in plain.graph.nodes)
    assert permutes == (0 if len(shape) == 2 else 2 + residual)  # none between two layers
    calls = [n.target._schema.name for n in plain.graph.nodes if n.op == "call_function"]
    assert (
        lanes == "rows" or calls.count("aten::conv2d") + calls.count("aten::linear") == 1 + residual
    )  # the dense layer again
    (ours,) = plain(x)
    assert torch.equal(ours, theirs)  # small integers: every sum is exact


def test_taps_are_stacked_only_where_that_is_less_work() -> None:
    def calls(whole: bool, kept: int) -> set[str]:
        weight = grouped_weight([16, 16], [kept, kept], (32, 16, 3, 3), whole=whole)
        gm = operator_graph(integers(2, 7, 9, 16), weight, activation="none", residual=False, padding=[1, 1])
        return {n.target._schema.name for n in standard.standard(gm).gm.graph.nodes if n.op == "call_function"}

    assert "aten::slice" in calls(whole=False, kept=30)
    assert "aten::slice" not in calls(whole=True, kept=4)
    assert "aten::slice" not in calls(whole=False, kept=130)


def test_work_counts_what_is_multiplied_and_groups_come_in_the_order_of_their_results() -> None:
    weight = grouped_weight([16, 8, 16], [4, 9, 4], (40, 16, 1, 1), whole=True)
    packed = pack(weight)
    found = expanded.standard(packed)
    assert found.work == 2 * 16 * 4 + 8 * 9
    assert sorted(map(len, found.row_groups)) == [8, 16, 16]
    assert [len(g) for g in found.row_groups] in ([16, 16, 8], [8, 16, 16])
    order = torch.cat([torch.from_numpy(g) for g in found.row_groups])  # number the rows so
    groups = [rows.numpy() for rows in torch.arange(len(order)).split([len(g) for g in found.row_groups])]
    renumbered = pack(weight[order], groups)
    x = integers(2, 5, 5, 16)
    gm = operator_graph(x, unpack(renumbered), activation="none", residual=False)
    gathers = [n for n in standard.standard(gm).gm.graph.nodes if n.target is torch.ops.aten.index_select.default]
    assert len(gathers) == 2  # of the columns, one for each bucket; none for the rows


def gather_graph(build: Any, x: Tensor) -> fx.GraphModule:
    gm = torch.export.export(build, (x,)).run_decompositions({}).module(check_guards=False)
    gm = clone(gm)
    refresh(gm)
    return gm


class Gathers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("p", torch.tensor([3, 0, 1, 2, 7, 4, 5, 6]))  # not its own inverse
        self.register_buffer("q", torch.tensor([3, 1, 1, 0, 6]))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "two gathers":
            return nn.functional.max_pool2d(x.index_select(1, self.p).relu(), 2).index_select(1, self.q)
        if self.kind == "before a convolution":
            return self.conv(x.index_select(1, self.p).relu())
        if self.kind == "before a grouped convolution":
            return self.grouped(x.index_select(1, self.p).relu())
        if self.kind == "after a convolution":
            return self.grouped(self.conv(x).relu().index_select(1, self.p))
        if self.kind == "after one with another reader":
            y = self.conv(x)
            return self.grouped(y.index_select(1, self.p)) + y
        if self.kind == "wanted twice":
            return self.conv(x).index_select(1, self.q)
        return self.conv(x.index_select(1, self.p) + x)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("two gathers", 1), ("before a convolution", 0), ("before a grouped convolution", 1),
        ("after a convolution", 0), ("after one with another reader", 1), ("wanted twice", 1), ("before a sum", 1),
    ],
)  # fmt: skip
def test_gathers_are_done_beforehand_where_nothing_stops_them(kind: str, left: int) -> None:
    x, model = integers(2, 8, 6, 6), Gathers(kind).eval()
    for p in model.parameters():
        p.data = integers(*p.shape)
    gm = gather_graph(model, x)
    theirs = gm(x)
    merge_gathers(gm)
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert torch.equal(gm(x), theirs)
    assert sum(n.target is torch.ops.aten.index_select.default for n in gm.graph.nodes) == left


def test_a_model_elsewhere_than_on_the_cpu_is_refused() -> None:
    gm = operator_graph(
        integers(2, 4, 4, 16), grouped_weight([16], [4], (16, 16), whole=False), activation="none", residual=False
    )
    placeholder = next(iter(gm.graph.nodes))
    placeholder.meta["val"] = torch.empty(2, 4, 4, 16, device="meta")
    with pytest.raises(TargetError, match=r"on the CPU; got meta"):
        Onnx().lower(gm, ())
