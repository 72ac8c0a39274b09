"""Symbolic sizes: what is found at one length of a sequence holds at every other."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter

import fxsparse
from fxsparse import Masks
from fxsparse.backend.any_size import AnySize, Assumptions
from fxsparse.dynamo import backend
from fxsparse.errors import CaptureError
from fxsparse.ir.symbols import concrete, crossing_dims, symbolic_dims

if "fxsparse" not in torch._dynamo.list_backends():  # an installed fxsparse has its entry point
    torch._dynamo.register_backend(backend, "fxsparse")

DIM, WIDE = 8, 12
ROWS = {"every second": slice(None, None, 2), "the first half": slice(0, WIDE // 2)}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """Tokens [B, S, 8] -> [B, S, 12], something in the middle, -> [..., 5]; half of the 12 are constants."""

    def __init__(self, between: Callable[[Tensor], Tensor], features: int = WIDE) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(DIM, WIDE), nn.Linear(features, 5), between
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.relu(self.a(x))))


def at_every_size(model: nn.Module, masks: dict[str, Tensor], sizes: Any, **options: Any) -> list[Any]:
    """Compiled once for all sizes; the same as the masked model, and the reports."""
    reports: list[Any] = []
    given = {"masks": masks, "target": "eager", "measure": False, "on_report": reports.append, **options}
    plain = copy.deepcopy(model)
    Masks(masks).apply_(plain)
    fast = torch.compile(model, backend="fxsparse", options=given, dynamic=True)
    for shape in sizes:
        x = torch.randn(*shape, DIM, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-10, atol=1e-12)
    return reports


def dead(model: nn.Module, rows: slice = ROWS["every second"]) -> dict[str, Tensor]:
    mask = torch.ones_like(model.a.weight, dtype=torch.bool)
    mask[rows] = False  # the biases stay: these channels are constants
    return {"a.weight": mask}


SIZES = ((3, 2), (2, 6), (5, 9), (2, 17), (7, 4))


def filled(value: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0], x.shape[1], WIDE), value, dtype=x.dtype)


KEPT = {  # what leaves every position to itself: the constants go
    "nothing": lambda x: x,
    "more batch": lambda x: x.flatten(0, 1),
    "heads": lambda x: x.view(*x.shape[:2], 3, 4).transpose(1, 2).flatten(0, 1).sigmoid().view(x.shape[0], 3, -1, 4)
    .transpose(1, 2).flatten(2),
    "all of it": lambda x: x[:, :] + torch.zeros(x.shape[0], x.shape[1], 1, dtype=x.dtype),
    "twice": lambda x: torch.cat([x, x], 1),
    "reversed": lambda x: x.flip(1),
    "scaled": lambda x: x * torch.full((x.shape[1], 1), 2.0, dtype=x.dtype),
}  # fmt: skip
MIXED = {  # what does not: nothing may be taken for a constant
    "running sums": lambda x: x.cumsum(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(1),
    "softmax": lambda x: x.softmax(1),
    "shifted": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "padded": lambda x: F.pad(x, (0, 0, 2, 2)),
    "both ends": lambda x: F.pad(x, (0, 0, 2, 0)) * F.pad(x, (0, 0, 0, 2)),
    "last": lambda x: x[:, -1],
    "numbered": lambda x: x * torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(1),
    "samples numbered": lambda x: x * torch.arange(x.shape[0], dtype=x.dtype).view(-1, 1, 1),
    "length": lambda x: x * x.shape[1],
    "filled with the length": lambda x: x + torch.full((1, 1), x.shape[1], dtype=x.dtype),
    "causal": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() @ x,
    "positions": lambda x: x + torch.linspace(0, 1, 64 * WIDE, dtype=x.dtype).view(64, WIDE)[: x.shape[1]],
    "joined": lambda x: torch.cat([x, filled(0, x)], 1),
    "joined, then apart": lambda x: torch.cat([x, filled(0, x)], 1).reshape(x.shape[0], -1, 2, WIDE)[:, :, 1],
    "samples joined, then apart": lambda x: torch.cat([x, filled(0, x)]).view(-1, 2, x.shape[1], WIDE)[:, 1],
    "two constants": lambda x: torch.cat([x, x], 1) * torch.cat([filled(0, x), filled(1, x)], 1),
    "across": lambda x: x.reshape(x.shape[0], WIDE, x.shape[1]).transpose(1, 2),
    "across, then back": lambda x: x.reshape(x.shape[0], WIDE, x.shape[1])[:, ::2].reshape(x.shape[0], -1, WIDE // 2)
    .repeat(1, 1, 2),
    "across samples": lambda x: x.transpose(0, 1).reshape(x.shape),
    "convolved": lambda x: F.conv1d(x.transpose(1, 2), torch.ones(WIDE, 1, 3).to(x), padding=1, groups=WIDE)
    .transpose(1, 2),
    "pooled": lambda x: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention by hand": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["constants", "zeros"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", [*KEPT, *MIXED])
def test_what_is_found_at_one_size_holds_at_others(name: str, rows: str, bias: bool) -> None:
    model = Net({**KEPT, **MIXED}[name], WIDE)
    with torch.no_grad():
        model.a.bias.mul_(bias)
    reports = at_every_size(model, dead(model, ROWS[rows]), SIZES)
    assert reports
    if name in KEPT:
        assert len(reports) == 1  # one build for every size
        whole_heads = name == "heads" and rows == "the first half"  # one and a half of three are no heads of one size
        assert {r.name: r.rows_removed for r in reports[0].rows}["a.weight"] == (0 if whole_heads else WIDE // 2)


def test_samples_are_not_taken_for_channels() -> None:
    """[B, 8] -> [8, B]: at one sample, every channel would keep its place."""
    model = nn.Sequential(nn.Linear(DIM, DIM), Turned(), nn.Linear(DIM, 5)).double().eval()
    mask = torch.ones(DIM, DIM, dtype=torch.bool)
    mask[::2] = False
    at_every_size(model, {"0.weight": mask}, [(n,) for n in (2, 3, 8, 5)])


def test_a_constant_that_is_repeated_for_every_sample_is_not_stored_for_one() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.e = nn.Linear(DIM, WIDE), nn.Parameter(torch.randn(3, WIDE))
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            y = self.l(x).view(-1, 3, WIDE).flatten(0, 1)
            return y * self.e.expand(y.shape[0] // 3, 3, WIDE).flatten(0, 1)

    model = Repeated()
    fast = fxsparse.compile(model, {}, "eager", example_inputs=(torch.randn(2, 3, DIM).double(),), measure=False)
    x = torch.randn(5, 3, DIM).double()
    torch.testing.assert_close(fast(x), model(x))


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).reshape(DIM, x.shape[0]).t()


def test_generated_code_serves_every_size() -> None:
    model = Net(KEPT["heads"]).float()
    reports: list[Any] = []
    plain = copy.deepcopy(model)
    Masks(dead(model)).apply_(plain)
    options = {"masks": dead(model), "on_report": reports.append}
    fast = torch.compile(model, backend="fxsparse", options=options, dynamic=True)
    for shape in SIZES:
        x = torch.randn(*shape, DIM)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    (report,) = reports
    assert report.dense_ms is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_code_for_any_image_competes_in_the_inputs_own_layout(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1)).eval()
    mask = torch.ones_like(model[0].weight, dtype=torch.bool)
    mask[::2] = False
    Masks({"0.weight": mask}).apply_(plain := copy.deepcopy(model))
    reports: list[Any] = []
    options = {"masks": {"0.weight": mask}, "on_report": reports.append}
    fast = torch.compile(model, backend="fxsparse", options=options, dynamic=True)
    for shape in ((2, 3, 16, 20), (3, 3, 24, 9)):
        x = torch.randn(shape).contiguous(memory_format=layout)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    (report,) = reports
    assert len(report.timings) == 5


def test_what_generated_code_assumes_is_asked_before_each_call() -> None:
    ran: list[str] = []

    def code(name: str) -> Callable[..., list[str]]:
        return lambda *inputs: ran.append(name) or ran

    class AtMost(Assumptions):
        def __init__(self) -> None:
            pass

        def hold(self, inputs: Any) -> bool:
            return inputs[0].shape[0] <= 3

    run = AnySize(lambda inputs: code(f"for {len(inputs[0])}"), code("plain"), code("any"), AtMost())
    for n in (2, 4, 3, 4, *range(5, 14), 13):
        run(torch.zeros(n))
    assert ran == ["any", "for 4", "any", "for 4", *[f"for {n}" for n in range(5, 12)], "plain", "plain", "plain"]


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_of_any_size_is_convolved(target: str, packed: bool) -> None:
    first = nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()
    last = nn.Conv2d(32, 32, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    model = nn.Sequential(*first, *last).eval()
    masks = {f"{i}.weight": torch.ones_like(model[i].weight, dtype=torch.bool) for i in (0, 2, 5)}
    masks["0.bias"] = torch.arange(32) % 2 == 1
    masks["0.weight"][::2] = False
    masks["2.weight"][:8] = False  # constants, of which one carries the others past the padding
    masks["5.weight"][:16, :16] = masks["5.weight"][16:, 16:] = False
    Masks(masks).apply_(plain := copy.deepcopy(model))
    reports: list[Any] = []
    formats = "shuffled_block" if packed else "dense"
    options = {"masks": masks, "target": target, "measure": False, "formats": formats, "on_report": reports.append}
    fast = torch.compile(model, backend="fxsparse", options=options, dynamic=True)
    large = [(2, 3, 280, 280)] if target == "inductor" else []  # its code is for at most 4096 positions to pool
    for shape in ((2, 3, 16, 20), (3, 3, 24, 9), (2, 3, 5, 7), (4, 3, 33, 31), *large):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    (report,) = reports
    assert {r.name: r.rows_removed for r in report.rows if r.rows_removed} == {"0.weight": 16, "2.weight": 7}
    assert any("shuffled_block" in r.stored for r in report.rows) == packed


def test_a_size_that_is_bounded_is_tried_below(caplog: pytest.LogCaptureFixture) -> None:
    table = nn.Embedding(6, WIDE).double()

    class Positions(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) + table(torch.arange(x.shape[1])))

    model = Positions(KEPT["nothing"])
    assert len(at_every_size(model, dead(model), ((2, 6), (3, 4)))) == 1  # one more position would be out of range
    assert "dense" not in caplog.text


def sizes(text: str) -> list[Any]:
    """Sizes as they are in a fake tensor's shape."""
    found = [sympy.sympify(size) for size in text.split(",")]
    return [int(e) if e.is_number else SimpleNamespace(node=SimpleNamespace(expr=e)) for e in found]


@pytest.mark.parametrize(
    ("before", "after", "crossing"),
    [
        ("b,s,8", "b*s,8", ([], [])), ("b*s,8", "b,s,8", ([], [])), ("b,8,s,4", "b*8,s,4", ([], [])),
        ("b,s,8", "b,s,2,4", ([], [])), ("b,s,8", "b,s*8", ([], [])), ("b,s,6", "b,1,s,2,3", ([], [])),
        ("b*8,s", "b,8,s", ([], [])), ("s,8", "1,s*8", ([], [])), ("b,s,8", "b,8*s,1", ([], [])),
        ("b*s,8", "s,b*8", ([], [])), ("b,8,s", "b,8*s", ([1, 2], [1])), ("b,s,8", "b,8,s", ([1, 2], [1, 2])),
        ("b,8", "8,b", ([0, 1], [0, 1])), ("8,b", "b,8", ([0, 1], [0, 1])), ("2*s,8", "2,s,8", ([0], [0, 1])),
        ("b*8,s", "8,b,s", ([0], [0, 1])), ("7,b,2,4", "7*b,8", ([0, 1], [0])), ("b,s,8", "b,s/4,4,8", ([1], [1, 2])),
        ("b,s,6", "b,s/4,24", ([1, 2], [1, 2])),
    ],
)  # fmt: skip
def test_which_reshapes_mix_known_and_open_sizes(
    before: str, after: str, crossing: tuple[list[int], list[int]]
) -> None:
    assert crossing_dims(sizes(before), sizes(after)) == crossing


def test_sizes_follow_from_those_of_the_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x[:, :1]], 1).flatten(0, 1)

    dims = ({0: torch.export.Dim("b", min=2), 1: torch.export.Dim("s", min=2)},)
    gm: Any = torch.export.export(Two(), (torch.zeros(4, 5, 3),), dynamic_shapes=dims).run_decompositions({}).module()
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "call_function")
    assert symbolic_dims(last) == [0]
    assert concrete(last) == [6, 3]
    assert concrete(last, batch=7, more=2) == [7 * 8, 3]
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["val"] = None
    with pytest.raises(CaptureError, match="follows from the inputs' sizes"):
        concrete(last)


def test_inputs_of_another_rank_have_no_symbolic_dimensions() -> None:
    graph = fx.Graph()
    assert symbolic_dims(graph.placeholder("x")) == []


class Picture(nn.Module):
    """[B, 3, H, W] -> 8 channels, something in the middle, a layer on each pixel; half of the 8 are 0 or constants."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), between
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.relu(self.a(x))).movedim(1, -1))


PICTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "avg_pool with borders": lambda x: F.avg_pool2d(x, (3, 1), 1, (1, 0)),
    "avg_pool without": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "transposed": nn.ConvTranspose2d(8, 8, 3, 2, 1),
    "group_norm": lambda x: F.group_norm(x, 4),
    "instance_norm": F.instance_norm,
}


@pytest.mark.parametrize("bias", [False, True], ids=["zeros", "constants"])
@pytest.mark.parametrize("name", list(PICTURES))
def test_what_is_done_to_an_image_of_any_size(name: str, bias: bool) -> None:
    """The first image is so small that every window meets its border."""
    model = Picture(copy.deepcopy(PICTURES[name]))
    masks = {"a.weight": torch.arange(8)[:, None, None, None].expand_as(model.a.weight) >= 4}
    with torch.no_grad():
        model.a.bias[:4] = torch.tensor([0.5, 1.0, 0.25, 2.0]) if bias else 0
    plain, reports = copy.deepcopy(model), []
    Masks(masks).apply_(plain)
    options = {"masks": masks, "target": "eager", "measure": False, "on_report": reports.append}
    fast = torch.compile(model, backend="fxsparse", options=options, dynamic=True)
    counter = CompileCounter()
    counted = torch.compile(plain, backend=counter, dynamic=True)
    for batch, height, width in ((5, 2, 4), (3, 7, 9), (2, 12, 5), (4, 16, 16)):
        x = torch.randn(batch, 3, height, width, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-10, atol=1e-12)
            counted(x)
    # The first image may leave one pixel of a side, which TorchDynamo takes for a constant. Torch 2.11 has more.
    assert len(reports) == counter.frame_count <= (2 if torch.__version__ >= "2.12" else 4)
    if not bias:
        assert {r.name: r.rows_removed for r in reports[-1].rows}["a.weight"] == 4
