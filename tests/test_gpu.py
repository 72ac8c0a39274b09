"""What is different on a GPU: capture, layers of packed weights with their tokens side by side, and how all is timed.

Fake tensors stand for a device where shapes are enough. Marked `gpu`: the real thing.
"""

from __future__ import annotations

import copy
import itertools
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxsparse
from fxsparse.backend import inductor
from fxsparse.backend.any_size import Assumptions
from fxsparse.errors import InputError, TargetError
from fxsparse.formats import FORMATS
from fxsparse.formats.gpu import for_gpu
from fxsparse.formats.shuffled_block import pack
from fxsparse.formats.shuffled_block_few import few
from fxsparse.formats.shuffled_block_gpu import tiled, transposed
from fxsparse.formats.turned import turned
from fxsparse.ir.capture import capture
from fxsparse.ir.graph import aten, call_nodes, clone, flat, get_tensor, set_tensor
from fxsparse.ir.inputs import CUDNN_BATCH, Call, exported
from fxsparse.ir.masks import Masks
from fxsparse.kernels.triton import ACTIVATIONS, FEW_COLUMNS, Tiles, shuffled_block_few, shuffled_block_transposed
from fxsparse.kernels.triton import turned as turn
from fxsparse.package import aoti
from fxsparse.passes import Context, choose_again, choose_formats
from fxsparse.verify import reference
from tests.test_shuffled_block import allowed, blocks
from tests.test_storage import Of, integers
from tests.test_triton_shuffled_block import DTYPES, Run, run

__all__ = ["run"]  # a fixture


@pytest.fixture
def fake() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


# ------------------------------------------------------------ capture


def test_a_batch_norm_on_a_gpu_leaves_the_batch_open(fake: FakeTensorMode) -> None:
    with fake, torch.device("cuda"):
        model, x = torchvision.models.mobilenet_v2().eval(), torch.empty(1, 3, 64, 64)
    graph = exported(model, Call((x,), {}), dynamic_batch=True).graph
    *_, last = (n for n in graph.nodes if n.op == "call_function")
    assert not isinstance(last.meta["val"].shape[0], int)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] <= 100 else x


def test_a_limit_of_the_model_s_own_is_still_refused() -> None:
    with pytest.raises(torch._dynamo.exc.UserError, match="max=100"):
        exported(Branches(), Call((torch.zeros(2, 3),), {}), dynamic_batch=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_code_for_any_size_keeps_to_the_limit_it_was_traced_with(fake: FakeTensorMode, device: str) -> None:
    with fake, torch.device(device):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), torch.empty(2, 3, 5, 5)
    graph = exported(model, Call((x,), {}), dynamic_batch=True).graph
    assumed = Assumptions([graph.find_nodes(op="placeholder")[-1].meta["val"], 2.0], [])
    assert assumed.any == (device == "cuda")
    sizes = [torch.empty(CUDNN_BATCH + more, 3, 5, 5, device="meta") for more in (0, 1)]
    assert [assumed.hold([size]) for size in sizes] == [True, device == "cpu"]
    assert not Assumptions([torch.empty(4, 3)], []).any


# ------------------------------------------------------------ the kernel


def errors(
    shape: tuple[int, int, int], rows: int, density: float, dtype: torch.dtype, activation: str, tiles: Tiles | None,
    device: str,
) -> tuple[float, float]:  # fmt: skip
    """The kernel's largest error, and what is allowed. Runs in the device's process."""
    out_features, width, tokens = shape
    weight = blocks((out_features, width), rows, density, 0).to(dtype)
    g = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(s, generator=g).to(dtype) for s in ((width, tokens), (out_features,)))
    arrays = [t.to(device) for t in tiled(pack(weight))]
    y = shuffled_block_transposed(
        x.to(device), *arrays, bias.to(device), activation, out_features=out_features, tiles=tiles
    )
    assert (y.shape, y.dtype, y.is_contiguous()) == ((out_features, tokens), dtype, True)
    act = ACTIVATIONS[activation]
    exact = act(weight.double() @ x.double() + bias.double()[:, None])
    own = act(F.linear(x.t(), weight, bias).t())
    return float((y.cpu().double() - exact).abs().max()) if tokens else 0.0, allowed(own, exact)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_agrees_with_float64(run: Run, data: st.DataObject) -> None:
    arguments = (
        data.draw(st.tuples(st.integers(1, 150), st.integers(1, 80), st.sampled_from([0, 1, 7, 16, 33, 150]))),
        data.draw(st.sampled_from([1, 5, 16, 64, 130])),
        data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from(sorted(ACTIVATIONS))),
        data.draw(st.sampled_from([None, Tiles(16, 16, 16), Tiles(32, 64, 32), Tiles(64, 128, 64, 8)])),
    )
    error, most = run(errors, *arguments)
    assert error <= most, arguments


def test_a_row_in_no_group_is_refused() -> None:
    arrays = tiled(pack(blocks((20, 8), 16, 0.5, 0)))
    with pytest.raises(InputError, match="rows: expected 21 rows; got 20"):
        shuffled_block_transposed(torch.zeros(8, 3), *arrays, out_features=21)


def test_tokens_first_are_refused_with_the_way_out() -> None:
    arrays = tiled(pack(blocks((20, 8), 16, 0.5, 0)))
    with pytest.raises(InputError, match=r"\[tokens, I\]; got .*\n  Flatten what is not features"):
        shuffled_block_few(torch.zeros(3, 1, 8), *arrays, out_features=20)
    with pytest.raises(
        InputError, match=r"\[I, tokens\]; got .*not contiguous.\n  Tokens lie side by side here: x.t\(\)"
    ):
        shuffled_block_transposed(torch.zeros(3, 8).t(), *arrays, out_features=20)


def tiles_for(*shapes: tuple[Any, ...]) -> list[tuple[int, ...]]:
    module = import_module("fxsparse.kernels.triton.transposed")
    return [tuple(module.choose_tiles(*shape)) for shape in shapes[:-1]]  # the last is the device


def test_tiles_are_narrower_where_there_is_little_to_do(run: Run) -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [
        (8192, 32, 128, 999, bf16), (64, 2, 128, 999, bf16), (8192, 64, 64, 99, bf16), (200, 4, 9, 99, bf16),
        (999, 40, 64, 99, fp32),
    ]  # fmt: skip
    assert run(tiles_for, *shapes) == [
        (128, 128, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 32, 4, 3), (64, 16, 32, 4, 4), (128, 64, 16, 4, 3),
    ]  # fmt: skip


def test_groups_with_equal_columns_are_one() -> None:
    packed = pack(blocks((256, 64), 256, 0.3, 0))
    assert packed.groups == 4
    rows, row_ptr, columns, *_ = tiled(packed)
    assert row_ptr.tolist() == [0, 256]
    assert rows.tolist() == list(range(256))
    assert torch.equal(columns, packed.columns[: len(columns)])


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arrays = tiled(pack(blocks((20, 8), 16, 0.5, 0).to(dtype)))
        for bias in (None, torch.randn(20, dtype=dtype)):
            arguments = (torch.randn(8, 2, 5, dtype=dtype), *arrays, bias, 20, "gelu")
            tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(transposed, arguments, test_utils=tests)
        torch.library.opcheck(few, (torch.randn(2, 1, 8, dtype=dtype), *arrays, 20), test_utils=tests)


# ------------------------------------------------------------ graphs


def linear(ins: int, outs: int) -> nn.Linear:
    return nn.Linear(ins, outs)


def mlp(layers: Any, x: Tensor) -> Tensor:
    y: Tensor = F.relu(x + layers["b"](F.gelu(layers["a"](x))))
    return y


def packed_model() -> nn.Module:
    return Of(mlp, a=linear(64, 256), b=linear(256, 64)).eval()


def packed_mlp(dtype: torch.dtype = torch.float32, device: str = "cpu", target: str = "eager") -> tuple[Any, Tensor]:
    model = packed_model().to(device, dtype)
    x = integers(3, 5, 64).to(device, dtype)
    options: dict[str, Any] = {"formats": "shuffled_block", "measure": False}
    return fxsparse.compile(model, target=target, example_inputs=x, **options), x


def exact_of(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the model gives in its own dtype, and in float64."""
    with torch.no_grad():
        own = model(x)
        return own, model.double()(x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_for_a_gpu_computes_the_same(dtype: torch.dtype) -> None:
    fast, x = packed_mlp(dtype)
    gm = for_gpu(flat(fast.graph_module))
    first, second = call_nodes(gm, transposed)
    assert [first.args[-1], second.args[-1]] == ["gelu", "none"]
    for tokens in (x, integers(7, 5, 64).to(dtype)):
        own, exact = exact_of(packed_model().to(dtype), tokens)
        assert float((gm(tokens)[0].double() - exact).abs().max()) <= allowed(own, exact)


def test_between_two_layers_nothing_is_copied() -> None:
    fast, x = packed_mlp()
    copied: list[int] = []

    class Watch(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_function(target, args, kwargs)
            if target is torch.ops.aten.contiguous.default:
                copied.append(result.data_ptr() != args[0].data_ptr())
            return result

    Watch(for_gpu(flat(fast.graph_module))).run(x)
    assert sum(copied) == 0


def gated(layers: Any, x: Tensor) -> Tensor:
    """As in a LLaMA: a norm, two layers, an elementwise product, a third layer, a sum."""
    normed = layers["norm"](x)
    y: Tensor = x + layers["c"](F.silu(layers["a"](normed)) * layers["b"](normed))
    return y


@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 64)])
def test_only_what_is_not_elementwise_is_turned(shape: tuple[int, ...]) -> None:
    model = Of(gated, norm=nn.LayerNorm(64), a=linear(64, 256), b=linear(64, 256), c=linear(256, 64)).eval()
    x = integers(*shape)
    fast = fxsparse.compile(model, target="eager", example_inputs=x, formats="shuffled_block", measure=False)
    gm = for_gpu(flat(fast.graph_module))
    assert len(list(call_nodes(gm, transposed))) == 3
    there, back = call_nodes(gm, turned)
    assert (there.args[1], back.args[1]) == (True, False)
    assert len(there.users) == 2
    own, exact = exact_of(model, x)
    assert float((gm(x)[0].double() - exact).abs().max()) <= allowed(own, exact)


def test_what_is_read_in_both_ways_is_turned_for_one_of_them() -> None:
    def forward(layers: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.silu(layers["a"](x)) * 2
        return layers["b"](y), y + 1

    model = Of(forward, a=linear(64, 256), b=linear(256, 64)).eval()
    x = integers(30, 64)
    fast = fxsparse.compile(model, target="eager", example_inputs=x, formats="shuffled_block", measure=False)
    gm = for_gpu(flat(fast.graph_module))
    assert [n.args[1] for n in call_nodes(gm, turned)].count(True) == 2
    with torch.no_grad():
        own, exact = model(x)[0], model.double()(x.double())[0]
    assert float((gm(x)[0].double() - exact).abs().max()) <= allowed(own, exact)


def test_a_sum_with_what_has_features_last_is_made_in_that_order() -> None:
    def forward(layers: Any, x: Tensor) -> Tensor:
        y: Tensor = layers["b"](layers["a"](x) + layers["norm"](x))
        return y

    model = Of(forward, norm=nn.LayerNorm(64), a=linear(64, 64), b=linear(64, 256)).eval()
    options: dict[str, Any] = {"formats": "shuffled_block", "measure": False}
    fast = fxsparse.compile(model, target="eager", example_inputs=integers(30, 64), **options)
    gm = for_gpu(flat(fast.graph_module))
    assert [n.args[1] for n in call_nodes(gm, turned)] == [True, False, True, False]


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_for_few_tokens_nothing_is_turned(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = Of(gated, norm=nn.LayerNorm(64), a=linear(64, 256), b=linear(64, 256), c=linear(256, 64)).eval().to(dtype)
    x, options = integers(*shape).to(dtype), {"formats": "shuffled_block", "dynamic_batch": len(shape) > 1}
    fast = fxsparse.compile(model, target="eager", example_inputs=x, measure=False, **options)  # type: ignore[arg-type]
    gm = for_gpu(flat(fast.graph_module))
    assert len(list(call_nodes(gm, few))) == 3
    assert not list(call_nodes(gm, turned, transposed))
    for tokens in (x, integers(7, *shape[1:]).to(dtype)) if len(shape) > 1 else (x,):
        own, exact = exact_of(copy.deepcopy(model), tokens)
        assert gm(tokens)[0].dtype == dtype
        assert float((gm(tokens)[0].double() - exact).abs().max()) <= allowed(own, exact)


def errors_of_few(
    shape: tuple[int, int, int], rows: int, density: float, dtype: torch.dtype, device: str
) -> tuple[float, float, int]:
    """The kernel's largest error, what is allowed, and how many parts it has. Runs in the device's process."""
    out_features, width, tokens = shape
    weight = blocks((out_features, width), rows, density, 0).to(dtype)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    arrays = [t.to(device) for t in tiled(pack(weight))]
    parts = shuffled_block_few(x.to(device), *arrays, out_features=out_features)
    assert (parts.shape[1:], parts.dtype) == ((tokens, out_features), torch.float32)
    exact = F.linear(x.double(), weight.double())
    error = (parts.sum(0).to(dtype).cpu().double() - exact).abs()
    return float(error.max()) if tokens else 0.0, allowed(F.linear(x, weight), exact), len(parts)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_few_tokens_agree_with_float64(run: Run, data: st.DataObject) -> None:
    arguments = (
        data.draw(st.tuples(st.integers(1, 200), st.integers(1, 900), st.integers(0, 6))),
        data.draw(st.sampled_from([5, 16, 64, 130])),
        data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        data.draw(st.sampled_from(DTYPES)),
    )
    error, most, _ = run(errors_of_few, *arguments)
    assert error <= most, arguments


def test_long_groups_are_cut_into_parts(run: Run) -> None:
    error, most, parts = run(errors_of_few, (64, 2000, 1), 64, 0.5, torch.bfloat16)
    assert error <= most
    assert parts == 1000 // (2 * FEW_COLUMNS) + 1


def turns(shape: tuple[int, int], dtype: torch.dtype, device: str) -> bool:
    """Whether the kernel's result is x turned. Runs in the device's process."""
    x = torch.arange(shape[0] * shape[1]).view(shape).to(dtype)
    y = turn(x.to(device))
    return y.is_contiguous() and torch.equal(y.cpu(), x.t())


@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (200, 1), (64, 128), (3, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_turns(run: Run, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert run(turns, shape, dtype)


def test_only_a_matrix_is_turned() -> None:
    for x in (torch.zeros(3), torch.zeros(2, 3, 4)):
        with pytest.raises(InputError, match=r"x: expected a matrix \[rows, columns\]; got .*\n  Flatten"):
            turn(x)


def test_turning_keeps_the_rules_of_torch_library() -> None:
    for first in (True, False):
        for shape in ((3, 5, 8), (8,)):
            tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(turned, (torch.randn(shape), first), test_utils=tests)


def test_what_a_gpu_has_no_kernel_for_is_said(fake: FakeTensorMode) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 8)).eval()
    nodes = [n for n in exported(model, Call((torch.zeros(2, 16, 3, 3),), {}), dynamic_batch=True).graph.nodes
             if n.op == "call_function" and n.target in FORMATS["shuffled_block"].layers]  # fmt: skip
    with fake, torch.device("cuda"):
        for dtype, of_conv, of_linear in (
            (torch.float32, "", ""),
            (torch.float16, "in 16 bits cuDNN's convolution is several times", ""),
            (torch.float64, "the kernel has no float64", "the kernel has no float64"),
        ):
            weights = [torch.empty(32, 16, 3, 3, dtype=dtype), torch.empty(8, 32, dtype=dtype)]
            whys = [FORMATS["shuffled_block"].why_not(n, w) for n, w in zip(nodes, weights, strict=True)]
            assert whys[0].startswith(of_conv)
            assert whys[1].startswith(of_linear)
            assert [bool(w) for w in whys] == [bool(of_conv), bool(of_linear)]
        wide = torch.empty(32, 16, 32, 32)
        assert "height + width up to 63" in FORMATS["shuffled_block"].why_not(nodes[0], wide)


def test_a_format_that_cannot_be_timed_leaves_the_layer_dense() -> None:
    def fails(*_: Any) -> float:
        raise RuntimeError("no kernel image is available\nand more")

    decisions = decided(Context(formats=("shuffled_block",), time_layer=lambda *_: 1.0, time_format=fails))
    assert [(d.accepted, d.why) for d in decisions] == [
        (False, "it cannot run here: RuntimeError: no kernel image is available")
    ] * 2


@pytest.mark.parametrize("standard", [False, True])
def test_on_a_gpu_nothing_is_chosen_untimed_but_by_targets_that_time_models(standard: bool) -> None:
    decisions = decided(Context(formats=("shuffled_block",), standard_operators=standard), device="cuda")
    assert [d.accepted for d in decisions] == [standard] * 2
    assert all(standard or d.why == "on a GPU only a timing can tell" for d in decisions)


@pytest.mark.parametrize(("second_s", "stored"), [(1.0, [True, True, False]), (1.5, [False, False, False])])
def test_a_layer_pays_for_what_is_turned_around_it(second_s: float, stored: list[bool]) -> None:
    """Turning takes half a second, a dense layer two. Between the first two is nothing to turn, unless one is dense."""

    def forward(layers: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = layers["norm"](x)
        return layers["norm"](layers["b"](F.gelu(layers["a"](h)))), layers["alone"](layers["other"](x))

    model = Of(forward, norm=nn.LayerNorm(64), other=nn.LayerNorm(64), a=linear(64, 64), b=linear(64, 64),
               alone=linear(64, 64)).eval()  # fmt: skip
    gm = on_a_gpu(capture(model, (integers(3, 5, 64),), Masks(), dynamic_batch=False))

    def time_format(node: Any, packed: Any, summed: bool = False, scattered: bool = False) -> float:
        return second_s if ".b." in node.args[1].target else 1.0

    ctx = Context(lambda *_: 2.0, time_format, ("shuffled_block",), time_turn=lambda *_: 0.5)
    for step in (choose_formats, choose_again):
        for decision in [d for d in step.plan(gm, ctx) if d.accepted]:
            step.apply(gm, decision)
    layers = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    assert [bool(n.meta[choose_formats.FORMAT]) for n in layers] == stored
    assert not any(d.accepted for d in choose_again.plan(gm, ctx))


def decided(ctx: Context, device: str = "cpu") -> list[Any]:
    """What choose_formats says of the two layers; on a GPU their values are fake."""
    gm = capture(packed_model(), (integers(3, 5, 64),), Masks(), dynamic_batch=False)
    return choose_formats.plan(gm if device == "cpu" else on_a_gpu(gm), ctx)


def on_a_gpu(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """With the fake values of a graph on one."""
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.empty(node.meta["val"].shape, device="cuda")
    return gm


def test_on_a_gpu_only_libraries_are_tuned_unless_inductor_is_told_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    assert inductor._tuned(gm) == {}
    monkeypatch.setattr(inductor, "on_gpu", lambda gm: True)
    assert inductor._tuned(gm)["max_autotune_gemm_backends"] == "ATEN"
    with config.patch(max_autotune=True):
        assert inductor._tuned(gm) == {}


def test_a_library_for_a_gpu_has_no_operators_that_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    fast, _ = packed_mlp()
    monkeypatch.setattr(aoti, "on_gpu", lambda gm: True)
    with pytest.raises(TargetError, match=r"got fxsparse.shuffled_block.default, whose kernel is called from it"):
        fast.save_aoti(tmp_path / "m.pt2")


# ------------------------------------------------------------ verification


def test_what_a_gpu_may_multiply_in_tf32_may_be_that_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    gm = flat(capture(model, (x,), Masks(), dynamic_batch=False))
    monkeypatch.setattr("fxsparse.verify.on_gpu", lambda gm: True)
    limits: dict[bool, float] = {}
    for tf32 in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        limits[tf32] = reference(gm, (x,)).allowed[0]
    rounded = clone(gm)
    for name in {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}:
        w = get_tensor(gm, name)
        set_tensor(rounded, name, (w.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32))
    off = float((rounded(x)[0].double() - gm(x)[0].double()).abs().max())
    assert 50 * limits[False] < off < limits[True] < 100 * off
    monkeypatch.setattr("fxsparse.verify.on_gpu", lambda gm: False)
    assert reference(gm, (x,)).allowed[0] == limits[False]


class Shifted(nn.Module):
    """A product, and a large constant that no product touches."""

    def __init__(self, layer: nn.Module, dims: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("table", torch.full((16, *[1] * dims), 4096.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + self.table


@pytest.mark.parametrize(
    ("layer", "size"), [(nn.Conv2d(3, 16, 3), (2, 3, 9, 9)), (nn.Linear(64, 16), (2, 64))], ids=["windows", "matrices"]
)
def test_only_products_that_their_switch_allows_it_may_be_in_tf32(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, size: tuple[int, ...]
) -> None:
    monkeypatch.setattr("fxsparse.verify.on_gpu", lambda gm: True)
    torch.manual_seed(0)
    x = torch.randn(size)
    gm, alone = (
        flat(capture(m.eval(), (x,), Masks(), dynamic_batch=False))
        for m in (Shifted(layer, len(size) - 2), nn.Sequential(layer))
    )
    limits: dict[tuple[bool, bool], tuple[float, float]] = {}
    before = torch.backends.cuda.matmul.allow_tf32
    for windows, matrices in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", windows)
        torch.backends.cuda.matmul.allow_tf32 = matrices
        limits[windows, matrices] = (reference(gm, (x,)).allowed[0], reference(alone, (x,)).allowed[0])
    torch.backends.cuda.matmul.allow_tf32 = before
    own = (True, False) if len(size) == 4 else (False, True)
    assert limits[own] == limits[True, True]
    assert limits[own[::-1]] == limits[False, False]
    assert 50 * limits[False, False][1] < limits[own][1] < 0.05
    assert limits[own][0] < 2 * limits[False, False][0] + limits[own][1]  # the table is not rounded
