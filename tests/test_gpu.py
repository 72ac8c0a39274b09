"""What is different on a GPU: capture, layers of packed weights with their tokens side by side, and how all is timed.

Fake tensors stand for a device where shapes are enough. Marked `gpu`: the real thing.
"""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxsparse
from fxsparse import measure
from fxsparse.backend import inductor
from fxsparse.backend.any_size import Assumptions
from fxsparse.errors import TargetError
from fxsparse.formats import FORMATS
from fxsparse.formats.gpu import for_gpu, together, turns
from fxsparse.formats.shuffled_block_few import few, has_few
from fxsparse.formats.shuffled_block_gpu import transposed
from fxsparse.formats.turned import turned
from fxsparse.ir.capture import capture
from fxsparse.ir.graph import aten, call_nodes, clone, flat, get_tensor, set_tensor
from fxsparse.ir.inputs import CUDNN_BATCH, Call, exported
from fxsparse.ir.masks import Masks
from fxsparse.package import aoti
from fxsparse.passes import Context, choose_again, choose_formats, turning
from fxsparse.verify import reference
from tests.test_shuffled_block import allowed
from tests.test_storage import Of, integers
from tests.test_triton_shuffled_block import run

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


def test_layers_that_read_one_x_share_its_turn() -> None:
    model = Of(gated, norm=nn.LayerNorm(64), a=linear(64, 256), b=linear(64, 256), c=linear(256, 64)).eval()
    for batch, wanted in ((7, [(0.5, False), (0.5, False), (0.0, True)]), (3, [])):
        gm = capture(model, (integers(batch, 64),), Masks(), dynamic_batch=True)
        layers = [n for n in gm.graph.nodes if n.target is aten.linear.default]
        assert [tuple(t) for t in turns(gm, layers).values()] == wanted


def mixed(seed: int) -> nn.Module:
    """Linear layers, norms and elementwise operators that read one another at random."""
    r = random.Random(seed)
    kinds = ["linear"] * 3 + ["norm", "gelu", "relu", "half", "product", "sum", "sum"]
    steps = [(r.choice(kinds), r.randrange(max(0, n - 2), n + 1), r.randrange(max(0, n - 3), n + 1)) for n in range(8)]

    def forward(layers: Any, x: Tensor) -> Tensor:
        values = [x]
        for i, (kind, a, b) in enumerate(steps):
            u, v = values[a], values[b]
            values.append({
                "linear": lambda i=i, u=u: layers[f"linear{i}"](u), "norm": lambda i=i, u=u: layers[f"norm{i}"](u),
                "gelu": lambda u=u: F.gelu(u), "relu": lambda u=u: F.relu(u), "half": lambda u=u: u * 0.5,
                "product": lambda u=u, v=v: u * v, "sum": lambda u=u, v=v: u + v,
            }[kind]())  # fmt: skip
        return values[-1]

    made = {"linear": lambda: linear(64, 64), "norm": lambda: nn.LayerNorm(64)}
    return Of(forward, **{f"{kind}{i}": made[kind]() for i, (kind, *_) in enumerate(steps) if kind in made}).eval()


@pytest.mark.parametrize("seed", range(40))
def test_layers_pay_for_no_less_than_is_turned(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pay for more where an activation was fused into a layer that also others read."""
    paid: list[tuple[float, int]] = []

    def plan(gm: torch.fx.GraphModule, ctx: Context) -> list[Any]:
        found = turns(gm, [n for n in gm.graph.nodes if n.meta.get(choose_formats.FORMAT)]).values()
        paid.append((sum(t.x for t in found), sum(t.y for t in found)))
        return []

    monkeypatch.setattr(choose_again, "plan", plan)
    model, x = mixed(seed), integers(30, 64)
    fast = fxsparse.compile(model, target="eager", example_inputs=x, formats="shuffled_block", measure=False)
    gm = for_gpu(flat(fast.graph_module))
    there = [n.args[1] for n in call_nodes(gm, turned)]
    ((x_turns, y_turns),) = paid
    assert x_turns > there.count(True) - 1e-6
    assert y_turns >= there.count(False)
    with torch.no_grad():
        torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(40))
def test_layers_are_weighed_with_all_that_their_turns_depend_on(seed: int) -> None:
    """So what is best for each of these sets is best for the model."""
    r = random.Random(seed)
    gm = capture(mixed(seed), (integers(30, 64),), Masks(), dynamic_batch=True)
    layers = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    chains = together(gm, layers)
    assert sorted(itertools.chain(*chains)) == sorted(layers)
    for _ in range(4):
        kept = [n for n in layers if r.random() < 0.6]
        apart = [turns(gm, [n for n in chain if n in kept]) for chain in chains]
        assert turns(gm, kept) == dict(itertools.chain(*(found.items() for found in apart)))


@pytest.mark.parametrize("seed", range(40))
def test_what_layers_stay_packed_is_no_worse_than_all_or_none_of_them(seed: int) -> None:
    r = random.Random(seed)
    gm = capture(mixed(seed), (integers(30, 64),), Masks(), dynamic_batch=True)
    layers = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    alone = {n: turning.Alone(r.uniform(1, 4), r.uniform(1, 4), 0.9) for n in layers}
    weighed = turning.weigh(gm, alone, Context(time_turn=lambda node, first: 0.5))

    def cost(kept: list[Any]) -> float:
        turned_s = sum(0.5 * t.x + 0.5 * t.y for t in turns(gm, kept).values())
        return turned_s + sum(alone[n].packed if n in kept else 0.9 * alone[n].dense for n in layers)

    kept = [n for n in layers if weighed[n].stays]
    assert cost(kept) <= min(cost([]), cost(layers)) + 1e-9
    for n in layers:
        assert cost(kept) <= cost([m for m in kept if m is not n]) + 1e-9
        if weighed[n].stays:
            change = cost([m for m in kept if m is not n]) - cost(kept) + 0.1 * alone[n].dense
            assert change == pytest.approx(weighed[n].dense - weighed[n].packed)


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_a_package_that_comes_back_on_a_gpu_has_shapes(
    tmp_path: Any, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, x = packed_mlp()
    fast.save(tmp_path / "m.fxsparse")
    for module in ("fxsparse.formats.gpu", "fxsparse.loading"):
        monkeypatch.setattr(f"{module}.on_gpu", lambda gm: True)
    again = fxsparse.load(tmp_path / "m.fxsparse", target=target)
    torch.testing.assert_close(again(x), fast(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "few"), [((1, 64), True), ((1, 3, 64), False), ((30, 64), False)])
def test_what_runs_as_few_tokens_is_timed_as_few(
    shape: tuple[int, ...], few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxsparse.measure.device_name", str)
    gm = capture(packed_model(), (integers(*shape),), Masks(), dynamic_batch=True)
    layers = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    packed = FORMATS["shuffled_block"].pack(get_tensor(gm, str(layers[0].args[1].target)))
    on_a_gpu(gm)
    cases = [
        measure._Case.of(layers[0], 256, 64, shape[0]),
        measure._packed_case(packed, layers[0], shape[0], False, False),
    ]
    assert ["from memory" in case.key for case in cases] == [few, few] == [has_few(layers[0])] * 2


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
        (False, "shuffled_block: it cannot run here: RuntimeError: no kernel image is available")
    ] * 2


@pytest.mark.parametrize("standard", [False, True])
def test_on_a_gpu_nothing_is_chosen_untimed_but_by_targets_that_time_models(standard: bool) -> None:
    decisions = decided(Context(formats=("shuffled_block",), standard_operators=standard), device="cuda")
    assert [d.accepted for d in decisions] == [standard] * 2
    assert all(standard or d.why == "on a GPU only a timing can tell" for d in decisions)


@pytest.mark.parametrize(
    ("second_s", "stored"),
    [
        (1.0, [True, True, False]),
        (1.4, [True, True, False]),  # 3.4 s together, dense 2 * 2 * 0.87; alone the second would not pay
        (1.5, [False, False, False]),
    ],
)
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
