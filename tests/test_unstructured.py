"""The unstructured format in the compiler: chosen, put into graphs, saved; its kernel is in test_shuffled_block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxsparse
from fxsparse.formats import BY_OPERATOR, FORMATS
from fxsparse.formats import shuffled_block_op as op
from fxsparse.formats.shuffled_block import ShuffledBlock, pack
from fxsparse.formats.shuffled_block_op import ShuffledBlockFormat, multiply, shuffled_block
from fxsparse.ir.graph import arg
from fxsparse.passes import Context
from tests.test_shuffled_block import agrees, blocks, torch_threads
from tests.test_storage import Of, conv, integers, layers, of, stored

FORCED = Context(formats=("unstructured",), force_formats=True)


class Residual(nn.Module):
    """Two convolutions with batch norm around a sum, a strided one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 20, 3, padding=1),
            nn.Conv2d(20, 20, 3, padding=1),
            nn.Conv2d(20, 20, 1),
        )
        self.norm, self.down = nn.BatchNorm2d(20), nn.Conv2d(20, 37, 3, stride=2, padding=1)
        self.head = nn.Linear(37, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.b(F.silu(self.a(x)))) + x)
        return self.head(F.relu(self.down(x)).mean((2, 3)))


def masked() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Residual().eval()
    masks = {n: torch.rand_like(p) < 0.15 for n, p in model.named_parameters() if p.dim() > 1}
    return model, masks


def reference(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """The masked model in float64."""
    state = {n: p.double() * masks.get(n, torch.ones(())) for n, p in model.state_dict().items()}
    return torch.func.functional_call(model.double(), state, (x.double(),))


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_model_with_scattered_zeros_computes_the_masked_model(
    target: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, masks = masked()
    x = torch.randn(2, 3, 15, 13)
    fast = fxsparse.compile(model.to(dtype), masks, target=target, example_inputs=x.to(dtype), formats="unstructured",
                            measure=False)  # fmt: skip
    assert {r.stored for r in fast.report.rows} == {"unstructured"}
    assert fast.report.params_after < 0.5 * fast.report.params_before
    for other in (x, torch.randn(5, 3, 15, 13)):
        expected = reference(model, masks, other)
        torch.testing.assert_close(fast(other.to(dtype)).double(), expected, rtol=tolerance, atol=tolerance)


def test_sums_and_activations_are_fused_and_rows_are_written_where_they_belong() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = F.relu(m["a"](x))
        return m["end"](F.relu(y + m["c"](F.relu(m["b"](y)))))

    model = Of(forward, a=conv(8, 64), b=conv(64, 32), c=conv(32, 64), end=conv(64, 3))
    gm, decisions = stored(model, integers(2, 8, 6, 6), ctx=FORCED)
    assert not of(decisions, "permute_channels")
    assert [arg(n, "lanes") for n in layers(gm)] == ["pixels"] * 3
    assert [arg(n, "residual") is not None for n in layers(gm)] == [False, False, True]


def test_channels_are_numbered_for_those_whose_order_matters() -> None:
    """The first to write does not care, so the other one leads."""
    choose = Context(lambda *_: 9.0, lambda _, p, **__: 1.0 if (p.lanes == "pixels") == (p.shape[1] == 16) else 2.0,
                     ("shuffled_block", "unstructured"))  # fmt: skip
    model = Of(lambda m, x: m["end"](m["a"](x) + m["b"](x[:, :8])), a=conv(16, 64), b=conv(8, 64), end=conv(64, 3))
    gm, decisions = stored(model, integers(1, 16, 5, 5), ctx=choose)
    a, b = (n for n in layers(gm) if arg(n, "shape")[0] == 64)
    assert (arg(a, "lanes"), arg(b, "lanes")) == ("pixels", "rows")
    assert [d.where for d in of(decisions, "permute_channels") if d.accepted] == ["layers.b"]
    rows = gm.get_buffer(str(arg(b, "rows").target))
    assert torch.equal(rows, torch.arange(64, dtype=torch.int32))


@pytest.mark.parametrize(("rows_s", "pixels_s", "best"), [(1.0, 0.5, "unstructured"), (0.4, 0.5, "shuffled_block")])
def test_the_faster_way_to_fill_the_lanes_is_chosen(rows_s: float, pixels_s: float, best: str) -> None:
    ctx = Context(lambda *_: 2.0, lambda _, p, **__: rows_s if p.lanes == "rows" else pixels_s,
                  ("shuffled_block", "unstructured"))  # fmt: skip
    _, decisions = stored(Of(lambda m, x: m["a"](x), a=conv(8, 64)), integers(1, 8, 5, 5), ctx=ctx)
    chosen = [d for d in of(decisions, "choose_formats") if d.accepted]
    assert [d.what for d in chosen] == [f"store as {best}"]


def test_a_dry_run_expects_little_of_moderate_sparsity() -> None:
    """One row alone takes 3.5 times as long as its share of a dense weight."""
    g = torch.Generator().manual_seed(0)
    for density, accepted in ((0.35, False), (0.1, True)):
        layer = conv(32, 64)
        model = Of(lambda m, x: m["a"](x), a=layer)
        with torch.no_grad():
            layer.weight.copy_((torch.rand(64, 32, 3, 3, generator=g) < density).float())
        _, decisions = stored(model, integers(1, 32, 5, 5), ctx=Context(formats=("unstructured",)))
        assert [d.accepted for d in of(decisions, "choose_formats")] == [accepted]


def test_targets_with_standard_operators_only_say_why_not() -> None:
    model, masks = masked()
    report = fxsparse.plan(model, masks, torch.randn(1, 3, 9, 9), target="onnx")
    assert "unstructured" not in {d.data.get("format") for d in report.decisions}
    form = FORMATS["unstructured"]
    node = fx.Graph().placeholder("x")
    assert form.why_not_standard(node, torch.ones(2, 2)) == (
        "standard operators have no use for zeros that rows do not share"
    )
    assert form.why_not(node, torch.ones(2, 2, device="meta")) == "single rows have a kernel for CPUs only"
    assert isinstance(BY_OPERATOR[shuffled_block], ShuffledBlockFormat)


def test_a_saved_model_loads_and_gives_the_same(tmp_path: Path) -> None:
    model, masks = masked()
    x = torch.randn(3, 3, 15, 13)
    fast = fxsparse.compile(model, masks, example_inputs=x, formats="unstructured", measure=False)
    fast.save(tmp_path / "model.fxsparse")
    assert torch.equal(fxsparse.load(tmp_path / "model.fxsparse")(x), fast(x))


def test_what_is_too_large_for_32_bits_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = blocks((20, 6, 3, 3), 1, 0.4, 0), torch.randn(1, 9, 11, 6)
    called: list[Any] = []
    monkeypatch.setattr(op, "run_on_cpu", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(op, "LARGEST_IMAGE", x.numel())
    got = multiply(pack(w, lanes="pixels"), x, padding=(1, 1))
    assert not called
    torch.testing.assert_close(got, F.conv2d(x.permute(0, 3, 1, 2), w, padding=1).permute(0, 2, 3, 1))


# Bands whose last is shorter, a stride larger than the kernel, more threads than bands, and few of everything.
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "size", "geometry"),
    [
        ((64, 64, 3, 3), (1, 57, 55, 64), {"padding": (1, 1)}),
        ((256, 256, 3, 3), (1, 14, 14, 256), {"padding": (1, 1)}),
        ((40, 16, 2, 3), (2, 17, 19, 16), {"stride": (3, 4), "padding": (1, 2)}),
        ((17, 33, 3, 3), (3, 7, 7, 33), {"padding": (1, 1), "dilation": (2, 3)}),
        ((33, 20, 1, 1), (1, 1, 1, 20), {"padding": (2, 2)}),
        ((16, 8, 5, 5), (1, 1, 300, 8), {"padding": (2, 4)}),
        ((9, 300, 1, 1), (7, 3, 5, 300), {}),
        ((512, 512, 3, 3), (2, 7, 7, 512), {"padding": (1, 1)}),
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 11])
def test_layers_agree_with_dense_ones(
    shape: tuple[int, ...], size: tuple[int, ...], geometry: dict[str, tuple[int, int]], rows: int, threads: int
) -> None:
    with torch_threads(threads):
        x = torch.randn(size, generator=torch.Generator().manual_seed(1))
        agrees(blocks(shape, rows, 0.1, 0), x, geometry)


def test_groups_take_rows_together_where_that_is_worth_it() -> None:
    packed = pack(blocks((64, 32, 3, 3), 4, 0.2, 0), lanes="pixels")
    assert isinstance(packed, ShuffledBlock)
    assert packed.row_ptr.diff().tolist() == [4] * 16
    assert packed.work == int(sum((4 + 2.5) * k for k in packed.column_ptr.diff().tolist()))
