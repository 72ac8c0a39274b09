"""choose_formats, permute_channels, lower_formats and fuse_epilogues: what they decide, and that results stay.

Weights and inputs are small integers here: every sum is exact in float32, so a right rewrite is equal bit for bit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code

import fxsparse
from fxsparse.analysis import axes
from fxsparse.backend import find_target
from fxsparse.backend.inductor import with_memory
from fxsparse.formats.shuffled_block_op import shuffled_block, shuffled_block_into
from fxsparse.ir.capture import capture
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import arg, flat, operator_name
from fxsparse.ir.masks import Masks
from fxsparse.passes import STORAGE, Context, canonicalize, fuse_epilogues, run
from tests.test_shuffled_block import blocks

FORCED = Context(formats=("shuffled_block",), force_formats=True)


class Of(nn.Module):
    """Named layers and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), function
        for i, layer in enumerate(layers.values()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                with torch.no_grad():
                    sparse = layer.weight.shape[0] >= 32 and layer.weight[0].numel() >= 4
                    shape = tuple(layer.weight.shape)
                    layer.weight.copy_(((blocks(shape, 16, 0.3 if sparse else 1.0, i) * 2).round()).clamp(-2, 2))
                    if layer.bias is not None:
                        layer.bias.copy_(torch.arange(shape[0]) % 5 - 2)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(self.layers, *x)


def conv(ins: int, outs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, size, padding=size // 2, **options)


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).float()


def stored(model: nn.Module, *x: Tensor, ctx: Context = FORCED) -> tuple[fx.GraphModule, list[Decision]]:
    """The graph after the storage passes, checked: equal outputs, and a second run accepts nothing."""
    model.eval()
    gm = capture(model, x, Masks(), dynamic_batch=True)
    run(gm, [canonicalize], Context())
    plan = run(gm, STORAGE, ctx)
    again = [d for step in (canonicalize, *STORAGE) for d in step.plan(gm, ctx) if d.accepted]
    assert not again
    with torch.no_grad():
        for batch in (x, tuple(torch.cat([t, t.flip(0)]) for t in x)):
            ours, theirs = gm(*batch), model(*batch)
            assert torch.equal(ours, theirs), f"off by {(ours - theirs).abs().max()}"
    return gm, list(plan.decisions)


def of(decisions: list[Decision], step: str) -> list[Decision]:
    return [d for d in decisions if d.step == step]


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is shuffled_block]


def scattered(gm: fx.GraphModule) -> int:
    rows = [gm.get_buffer(str(arg(n, "rows").target)) for n in layers(gm)]
    ends = [gm.get_buffer(str(arg(n, "row_ptr").target)) for n in layers(gm)]
    return sum(
        any((r[a:b].diff() != 1).any() for a, b in itertools.pairwise(e)) for r, e in zip(rows, ends, strict=True)
    )


def test_a_chain_of_convolutions_is_permuted_and_fused_whole() -> None:
    model = Of(lambda m, x: m["c"](F.relu(m["b"](F.relu(m["a"](x))))), a=conv(8, 64), b=conv(64, 48), c=conv(48, 5, 1))
    gm, decisions = stored(model, integers(2, 8, 9, 7))
    assert [d.why for d in of(decisions, "permute_channels")] == ["nothing tells its channels apart"] * 2
    assert [arg(n, "activation") for n in layers(gm)] == ["relu", "relu"]
    assert scattered(gm) == 0
    assert "relu" not in {operator_name(n) for n in gm.graph.nodes}


def test_a_residual_sum_is_fused_into_the_later_layer_and_shares_one_numbering() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = F.relu(m["a"](x))
        return m["end"](F.relu(y + m["c"](F.relu(m["b"](y)))))

    model = Of(forward, a=conv(8, 64), b=conv(64, 32), c=conv(32, 64), end=conv(64, 3))
    gm, decisions = stored(model, integers(2, 8, 6, 6))
    notes = {d.where: d.why for d in of(decisions, "permute_channels")}
    assert notes["layers.a"] == "nothing tells its channels apart; layers.c scatter their rows"
    assert [arg(n, "residual") is not None for n in layers(gm)] == [False, False, True]
    assert scattered(gm) == 1


def test_layers_with_equal_groups_in_a_residual_sum_scatter_nothing() -> None:
    model = Of(lambda m, x: m["end"](m["a"](x) + m["b"](x)), a=conv(8, 64), b=conv(8, 64), end=conv(64, 3))
    with torch.no_grad():
        model.layers["b"].weight.copy_(model.layers["a"].weight.flip(0).flip(0) * 2)
    gm, decisions = stored(model, integers(1, 8, 5, 5))
    assert "scatter" not in str(of(decisions, "permute_channels"))
    assert scattered(gm) == 0


def test_a_branch_that_another_reader_sees_is_not_fused() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = m["a"](x)
        return m["end"](F.relu(y)) + y.sum()

    _, decisions = stored(Of(forward, a=conv(4, 32), end=conv(32, 2)), integers(2, 4, 5, 5))
    assert not of(decisions, "fuse_epilogues")


@pytest.mark.parametrize(
    ("activation", "name"),
    [(F.relu, "relu"), (F.relu6, "relu6"), (F.silu, "silu"), (F.gelu, "gelu"), (F.hardswish, "hardswish")],
)
def test_every_activation_the_kernel_knows_is_fused(activation: Callable[[Tensor], Tensor], name: str) -> None:
    model = Of(lambda m, x: activation(m["a"](x)), a=nn.Linear(40, 32)).eval()
    gm = capture(model, (x := integers(3, 40),), Masks(), dynamic_batch=True)
    run(gm, [canonicalize, *STORAGE], FORCED)
    assert [arg(n, "activation") for n in layers(gm)] == [name]
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=2e-6, atol=1e-6)


def test_gelu_by_tanh_is_another_function_and_is_not_fused() -> None:
    model = Of(lambda m, x: F.gelu(m["a"](x), approximate="tanh"), a=nn.Linear(40, 32))
    gm, _ = stored(model, integers(3, 40))
    assert [arg(n, "activation") for n in layers(gm)] == ["none"]


def test_a_flattened_image_takes_the_permutation_into_the_linear_layer() -> None:
    model = Of(lambda m, x: m["fc"](F.max_pool2d(m["a"](x), 2).flatten(1)), a=conv(8, 64), fc=nn.Linear(64 * 6, 32))
    gm, decisions = stored(model, integers(2, 8, 4, 6))
    assert scattered(gm) == 1  # the linear layer's own rows are the output
    assert [d.why for d in of(decisions, "permute_channels")] == [
        "nothing tells its channels apart",
        "output signature",
    ]


def test_a_flattened_image_that_a_packed_layer_is_added_to_stays_in_its_order() -> None:
    def forward(m: nn.ModuleDict, x: Tensor, z: Tensor) -> Tensor:
        return m["fc"](m["a"](x).flatten(1) + m["l"](z))

    model = Of(forward, a=conv(8, 64), l=nn.Linear(40, 64 * 6), fc=nn.Linear(64 * 6, 3))
    _, decisions = stored(model, integers(2, 8, 2, 3), integers(2, 40))
    assert {d.why for d in of(decisions, "permute_channels")} == {"its channels are those of a flattened tensor"}


def test_an_image_flattened_twice_stays_in_its_order() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return m["fc"](m["a"](x).flatten(1).unsqueeze(2).flatten(1))

    stored(Of(forward, a=conv(8, 64), fc=nn.Linear(64 * 6, 3)), integers(2, 8, 2, 3))


def test_a_reshape_past_the_batch_ties_no_channels() -> None:
    symbol = sympy.Symbol("batch")
    batch, merged = (SimpleNamespace(node=SimpleNamespace(expr=e)) for e in (symbol, 5 * symbol))
    assert axes._kept_by_reshape([batch, 64, 6], [64, batch, 6]) == [(2, 2)]
    assert axes._kept_by_reshape([batch, 64, 2, 3], [batch, 64, 6]) == [(1, 1)]
    assert axes._kept_by_reshape([batch, 64, 6], [batch, 8, 8, 6]) == [(2, 3)]
    assert axes._kept_by_reshape([merged, 64], [batch, 5, 64]) == [(1, 2)]


def test_the_mean_over_positions_and_a_depthwise_convolution_let_a_permutation_through() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return m["fc"](m["dw"](m["a"](x)).sum((2, 3)))

    model = Of(forward, a=conv(8, 64), dw=conv(64, 64, groups=64), fc=nn.Linear(64, 3))
    gm, _ = stored(model, integers(2, 8, 4, 4))
    assert scattered(gm) == 0


@pytest.mark.parametrize(
    "between",
    [
        lambda y: torch.cat([y[:, :, 1:], y[:, :, :1]], 2),
        lambda y: y.flatten(2).transpose(1, 2).transpose(1, 2).reshape(y.shape[0], 64, 5, 5),
        lambda y: (
            y.permute(0, 2, 3, 1).reshape(y.shape[0], 25, 64).permute(0, 2, 1).unsqueeze(3)[:, :, :, 0].unsqueeze(3)
        ),
        lambda y: (y[:, :, 2] + y[:, :, 1])[:, :, :, None].expand(y.shape[0], 64, 5, 5),
        lambda y: y.view(y.shape[0], 1, 64, 25).select(1, 0).view(y.shape[0], 64, 5, 5),
    ],
)
def test_movement_along_other_dimensions_lets_a_permutation_through(between: Callable[[Tensor], Tensor]) -> None:
    model = Of(lambda m, x: m["b"](between(m["a"](x))), a=conv(8, 64), b=conv(64, 3))
    gm, decisions = stored(model, integers(2, 8, 5, 5))
    assert [d.accepted for d in of(decisions, "permute_channels")] == [True]
    assert scattered(gm) == 0


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda y: y.view(y.shape[0], 2, 32, 5, 5).transpose(1, 2).reshape(y.shape[0], 64, 5, 5), "reshape"),
        (lambda y: torch.cat([y[:, 32:], y[:, :32]], 1), "slice"),
        (lambda y: y.flip(1), "flip"),
        (lambda y: y.transpose(1, 3).reshape(y.shape[0], 64, 5, 5), "reshape"),
        (lambda y: F.group_norm(y, 4).round(), "group_norm"),
        (lambda y: y.softmax(1).round(), "softmax"),
    ],
)
def test_an_operator_that_tells_channels_apart_pins_them(between: Callable[[Tensor], Tensor], why: str) -> None:
    model = Of(lambda m, x: m["b"](between(m["a"](x))), a=conv(8, 64), b=conv(64, 3)).eval()
    gm = capture(model, (integers(2, 8, 5, 5),), Masks(), dynamic_batch=True)
    decisions = list(run(gm, [canonicalize, *STORAGE], FORCED))
    (refusal,) = of(decisions, "permute_channels")
    assert not refusal.accepted
    assert why in refusal.why
    assert refusal.what.endswith(": 1 scatter their rows")


def test_a_grouped_convolution_pins_its_channels_and_stays_dense() -> None:
    model = Of(lambda m, x: m["g"](m["a"](x)), a=conv(8, 64), g=conv(64, 32, groups=4))
    _, decisions = stored(model, integers(2, 8, 5, 5))
    whys = {d.where: d.why for d in of(decisions, "choose_formats") if not d.accepted}
    assert whys == {"layers.g.weight": "a grouped convolution has no columns to choose from"}
    assert [d.why for d in of(decisions, "permute_channels")] == ["grouped convolution layers.g"]


def test_layer_norm_and_its_vectors_follow_a_permutation() -> None:
    model = Of(
        lambda m, x: m["b"](m["norm"](m["a"](x))), a=nn.Linear(40, 64), norm=nn.LayerNorm(64), b=nn.Linear(64, 7)
    ).eval()
    with torch.no_grad():
        model.layers["norm"].weight.copy_(torch.arange(64))
        model.layers["norm"].bias.copy_(torch.arange(64) % 7)
    gm = capture(model, (x := integers(3, 5, 40),), Masks(), dynamic_batch=True)
    run(gm, [canonicalize, *STORAGE], FORCED)
    assert scattered(gm) == 0
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-3)


def test_channels_keep_their_numbering_where_the_batch_is_merged_with_a_length() -> None:
    """As nn.MultiheadAttention does before its last projection."""

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = m["a"](x)
        return m["end"](y + m["b"](F.relu(y).flatten(0, 1)).view(y.shape))

    model = Of(forward, a=nn.Linear(40, 64), b=nn.Linear(64, 64), end=nn.Linear(64, 3))
    for name in ("a", "b"):
        weight = blocks((64, model.layers[name].in_features), 16, 0.3, 0)
        with torch.no_grad():
            model.layers[name].weight.copy_((weight != 0).float())
    _, decisions = stored(model, integers(3, 5, 40))
    (decision,) = [d for d in of(decisions, "permute_channels") if "64 channels" in d.what]
    assert (decision.accepted, decision.why.partition(";")[0]) == (True, "nothing tells its channels apart")


def test_a_weight_that_two_layers_share_is_packed_for_each() -> None:
    model = Of(lambda m, x: m["a"](F.relu(m["a"](x))), a=conv(64, 64))
    gm, _ = stored(model, integers(1, 64, 5, 5))
    assert len(layers(gm)) == 2


def test_without_a_timer_the_stored_elements_decide() -> None:
    model = Of(lambda m, x: m["b"](m["a"](x)), a=conv(8, 64), b=conv(64, 5))
    _, decisions = stored(model, integers(1, 8, 5, 5), ctx=Context(formats=("shuffled_block",)))
    chosen = of(decisions, "choose_formats")
    assert [(d.where, d.accepted) for d in chosen] == [("layers.a.weight", True), ("layers.b.weight", False)]
    assert chosen[0].why.endswith("% of the work, not timed")


@pytest.mark.parametrize(("sparse_s", "accepted"), [(1.0, True), (1.73, True), (1.75, False), (3.0, False)])
def test_a_format_is_chosen_when_its_layer_is_faster_by_a_margin(sparse_s: float, accepted: bool) -> None:
    model = Of(lambda m, x: m["a"](x), a=conv(16, 64))
    ctx = Context(lambda *_: 2.0, lambda *_, **__: sparse_s, ("shuffled_block",))
    _, (decision, *_) = stored(model, integers(1, 16, 5, 5), ctx=ctx)
    assert decision.accepted == accepted
    assert decision.why.endswith(f"% of the work: {sparse_s * 1e6:.0f} us, dense 2000000 us")
    assert (decision.data["dense_us"], decision.data["sparse_us"]) == (2e6, sparse_s * 1e6)


@pytest.mark.parametrize(("batch", "sparse_s", "accepted"), [(1, 1.0, False), (6000, 1.0, True), (6000, 3.0, False)])
def test_a_layer_without_zeros_is_timed_where_its_result_is_of_new_pages(
    batch: int, sparse_s: float, accepted: bool
) -> None:
    ctx = Context(lambda *_: 2.0, lambda *_: sparse_s, ("shuffled_block",), batch=batch)
    _, (decision, *_) = stored(without_zeros(16), integers(2, 16, 5, 5), ctx=ctx)
    assert decision.accepted == accepted
    assert ("100% of the work" in decision.why) == (batch > 1)


@pytest.mark.parametrize(("channels", "sparse_s", "accepted"), [(3, 1.93, True), (3, 1.95, False), (16, 1.0, False)])
def test_a_first_layer_without_zeros_needs_a_small_margin(channels: int, sparse_s: float, accepted: bool) -> None:
    ctx = Context(lambda *_: 2.0, lambda *_: sparse_s, ("shuffled_block",))
    _, (decision, *_) = stored(without_zeros(channels), integers(2, channels, 5, 5), ctx=ctx)
    assert decision.accepted == accepted
    assert ("100% of the work" in decision.why) == (channels < 16)


def test_a_layer_without_zeros_that_stays_dense_has_no_other_reason() -> None:
    """Also where it was timed, or a format was asked for by name."""
    timed = Context(lambda *_: 2.0, lambda *_: 3.0, ("shuffled_block", "unstructured"))
    forced = Context(formats=("unstructured",), force_formats=True)
    for channels, ctx in ((3, timed), (16, forced)):
        _, decisions = stored(without_zeros(channels), integers(2, channels, 5, 5), ctx=ctx)
        chosen = of(decisions, "choose_formats")
        assert chosen
        assert not any(d.accepted for d in chosen)
        assert all(d.why.startswith("the weight has no zeros") for d in chosen)


def test_a_refusal_names_the_format() -> None:
    model = Of(lambda m, x: m["a"](x), a=conv(16, 64))
    _, untimed = stored(model, integers(1, 16, 5, 5), ctx=Context(formats=("shuffled_block", "unstructured")))
    ctx = Context(lambda *_: 2.0, lambda *_, **__: 3.0, ("shuffled_block", "unstructured"))
    _, timed = stored(model, integers(1, 16, 5, 5), ctx=ctx)
    refused = [d for d in of([*untimed, *timed], "choose_formats") if not d.accepted]
    assert len(refused) == 3
    for d in refused:
        assert d.why.startswith(f"{d.what.removeprefix('store as ')}: ")


def without_zeros(channels: int) -> nn.Module:
    layer = nn.Conv2d(channels, 64, 1)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 3.0)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("rows_s", "pixels_s", "what", "lanes"),
    [
        (1.0, 1.1, "store it otherwise than as shuffled_block", ["rows", "rows"]),
        (1.2, 1.1, "store as unstructured", ["rows", "pixels"]),
        (1.8, 1.9, "keep it dense", ["rows"]),
    ],
)
def test_a_layer_that_scatters_its_rows_is_chosen_a_format_again(
    rows_s: float, pixels_s: float, what: str, lanes: list[str]
) -> None:
    """Two layers are added, with groups of their own: the larger leads."""

    def time_format(node: Any, packed: Any, summed: bool = False, scattered: bool = False) -> float:
        return (rows_s if packed.lanes == "rows" else pixels_s) if scattered else 1.0 if packed.lanes == "rows" else 1.5

    model = Of(lambda m, x: m["end"](m["a"](x) + m["b"](x)), a=conv(16, 64), b=conv(16, 64), end=conv(64, 3))
    formats = ("shuffled_block", "unstructured")
    ctx = Context(lambda node, *_: 9.0 if node.args[1].meta["val"].shape[0] == 3 else 2.0, time_format, formats)
    gm, decisions = stored(model, integers(2, 16, 6, 6), ctx=ctx)
    (again,) = of(decisions, "choose_again")
    assert (again.what, again.accepted) == (what, len(lanes) < 2 or "pixels" in lanes)
    times = f"shuffled_block {rows_s * 1e6:.0f} us, unstructured {pixels_s * 1e6:.0f} us, dense 2000000 us"
    assert again.why == f"its rows stay scattered: {times}"
    assert sorted(str(arg(n, "lanes")) for n in layers(gm) if arg(n, "shape")[0] == 64) == sorted(lanes)


def test_the_report_says_why_a_scattered_layer_is_dense_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_format(self: Any, node: Any, packed: Any, summed: bool = False, scattered: bool = False) -> float:
        return 1.0 if scattered else 1e-12

    monkeypatch.setattr("fxsparse.measure.LayerTimes.of_format", of_format)
    model = Of(lambda m, x: m["end"](m["a"](x) + m["b"](x)), a=conv(16, 64), b=conv(16, 64), end=conv(64, 3)).eval()
    report = fxsparse.compile(model, target="eager", example_inputs=(integers(2, 16, 6, 6),)).report
    (scattered,) = [r for r in report.rows if r.stored == "dense" and r.name != "layers.end.weight"]
    assert scattered.dense_for.startswith("its rows stay scattered: shuffled_block 1000000 us")


@pytest.mark.parametrize("pixels_s", [2e-9, 4e-9])
def test_the_report_gives_the_time_of_a_scattered_layer_as_it_is(
    pixels_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_format(self: Any, node: Any, packed: Any, summed: bool = False, scattered: bool = False) -> float:
        return (3e-9 if packed.lanes == "rows" else pixels_s) if scattered else 1e-9 if packed.lanes == "rows" else 2e-9

    monkeypatch.setattr("fxsparse.measure.LayerTimes.of_format", of_format)
    model = Of(lambda m, x: m["end"](m["a"](x) + m["b"](x)), a=conv(16, 64), b=conv(16, 64), end=conv(64, 3)).eval()
    report = fxsparse.compile(model, target="inductor", example_inputs=(integers(2, 16, 6, 6),)).report
    rows = {r.stored: r.sparse_us for r in report.rows if r.shape[0] == 64 and (r.sparse_us or 0) > 1e-3}
    best = "unstructured" if pixels_s < 3e-9 else "shuffled_block"
    assert rows[best] == pytest.approx(min(pixels_s, 3e-9) * 1e6)


def test_nothing_is_chosen_again_where_nothing_is_timed() -> None:
    model = Of(lambda m, x: m["end"](m["a"](x) + m["b"](x)), a=conv(16, 64), b=conv(16, 64), end=conv(64, 3))
    for ctx in (FORCED, Context(formats=("shuffled_block",))):
        gm, decisions = stored(model, integers(2, 16, 6, 6), ctx=ctx)
        assert scattered(gm) == 1
        assert not of(decisions, "choose_again")


def test_a_target_without_formats_gets_none() -> None:
    _, decisions = stored(Of(lambda m, x: m["a"](x), a=conv(8, 64)), integers(1, 8, 5, 5), ctx=Context())
    assert not decisions


def test_a_wrong_permutation_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_only(node: fx.Node, x_dim: int, out_dim: int, links: Any) -> None:
        axes._rows(node, out_dim, links)

    monkeypatch.setattr(axes, "_contract", rows_only)
    model = Of(lambda m, x: m["b"](F.relu(m["a"](x))), a=conv(8, 64), b=conv(64, 48))
    with pytest.raises(AssertionError):
        stored(model, integers(2, 8, 5, 5))


def test_a_residual_fused_twice_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_epilogues, "_residual", lambda chain: chain.nodes[0].args[0])
    model = Of(lambda m, x: m["a"](x) + m["b"](x), a=conv(8, 32), b=conv(8, 32))
    with pytest.raises((AssertionError, RuntimeError)):
        stored(model, integers(2, 8, 5, 5))


# ------------------------------------------------------------ through compile


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_with_blocks_gives_the_masked_model_at_any_batch_size(target: str, dtype: torch.dtype) -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = F.relu(m["a"](x))
        return m["fc"]((y + m["c"](F.relu(m["b"](y)))).mean((2, 3)))

    model = Of(forward, a=conv(8, 64), b=conv(64, 32), c=conv(32, 64), fc=nn.Linear(64, 5)).eval().to(dtype)
    fast = fxsparse.compile(model, target=target, example_inputs=(integers(2, 8, 6, 6).to(dtype),), measure=False)
    assert {r.stored for r in fast.report.rows} == {"shuffled_block", "dense"}
    for batch in (2, 5, 1):
        x = integers(batch, 8, 6, 6).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(
                fast(x),
                model(x),
                rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
                atol=1e-1 if dtype == torch.bfloat16 else 1e-4,
            )


def test_formats_dense_stores_nothing_else() -> None:
    model = Of(lambda m, x: m["a"](x), a=conv(8, 64))
    fast = fxsparse.compile(
        model, target="eager", example_inputs=(integers(1, 8, 5, 5),), measure=False, formats="dense"
    )
    assert {r.stored for r in fast.report.rows} == {"dense"}


def test_the_report_counts_blocks_and_names_the_format() -> None:
    model = Of(lambda m, x: m["b"](m["a"](x)), a=conv(8, 64), b=conv(64, 5))
    report = fxsparse.plan(model, None, (integers(1, 8, 5, 5),))
    row = report.rows[0]
    assert row.stored == "shuffled_block"
    nonzero = int((model.layers["a"].weight != 0).sum())
    assert nonzero <= row.params_after < row.params_before
    assert row.macs_after == row.params_after * 25
    assert "shuffled block" in str(report)
    assert report.to_dict()["rows"][0]["stored"] == "shuffled_block"


def test_without_a_compiler_eager_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = Of(lambda m, x: m["a"](x), a=conv(8, 64))
    fast = fxsparse.compile(model, target="eager", example_inputs=(integers(1, 8, 5, 5),), measure=False)
    assert {r.stored for r in fast.report.rows} == {"dense"}


def test_float64_has_no_kernel_and_says_so() -> None:
    model = Of(lambda m, x: m["a"](x), a=conv(8, 64)).double()
    report = fxsparse.plan(model, None, (integers(1, 8, 5, 5).double(),))
    whys = {d.what: d.why for d in report.decisions if d.step == "choose_formats"}
    assert whys["store as shuffled_block"] == "the kernel has no float64"


def test_inductor_gives_every_packed_layer_memory_of_its_own_planning() -> None:
    model = Of(lambda m, x: m["b"](F.relu(m["a"](x))), a=conv(16, 32), b=conv(32, 48))
    gm, _ = stored(model, integers(2, 16, 9, 9))
    lowered = with_memory(flat(gm))
    targets = [n.target for n in lowered.graph.nodes]
    assert targets.count(shuffled_block_into) == len(layers(gm)) == 2
    assert shuffled_block not in targets
    for x in (integers(2, 16, 9, 9), integers(5, 16, 9, 9)):
        assert torch.equal(lowered(x)[0], flat(gm)(x)[0])


def test_a_bias_that_is_computed_at_every_call_stays_an_argument() -> None:
    """What never changes is handed over as one tensor; this bias is no part of it."""
    gm, _ = stored(Of(lambda m, x: m["a"](x), a=conv(16, 32)), integers(2, 16, 9, 9))
    node = layers(gm)[0]
    bias = arg(node, "bias")
    with gm.graph.inserting_before(node):
        node.replace_input_with(bias, gm.graph.call_function(torch.ops.aten.neg.default, (bias,)))
    lowered = with_memory(flat(gm))
    assert [n.target for n in layers(lowered)] == [shuffled_block]
    x = integers(2, 16, 9, 9)
    assert torch.equal(lowered(x)[0], flat(gm)(x)[0])


def _in_place(model: nn.Module, x: Tensor) -> int:
    """How many packed layers write into their residual, in Inductor's graph; its results are compared too."""
    gm, _ = stored(model, x)
    lowered = with_memory(flat(gm))
    made = [n.target for n in lowered.graph.nodes].count(torch.ops.aten.new_empty.default)
    wanted = flat(gm)(x)
    for got, want in zip(lowered(x.clone()), wanted, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(find_target("inductor").lower(gm, [x])(x), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    return len(layers(gm)) - made


def test_a_sum_takes_the_place_of_a_residual_that_is_read_last() -> None:
    def block(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = F.relu(m["a"](x))
        y = F.relu(m["c"](F.relu(m["b"](y))) + y)
        return F.relu(m["e"](F.relu(m["d"](y))) + y)

    convs = dict(zip("abcde", (conv(16, 64), *(conv(64, 64) for _ in range(4))), strict=True))
    assert _in_place(Of(block, **convs), integers(2, 16, 9, 9)) == 2


def _multiplied_too(m: nn.ModuleDict, x: Tensor) -> Tensor:
    y = F.relu(m["a"](x))
    return F.relu(m["b"](y) + y)


def _read_later(m: nn.ModuleDict, x: Tensor) -> Tensor:
    y = F.relu(m["a"](x))
    return F.relu(m["b"](F.relu(m["c"](y))) + y) * y.amax((2, 3), keepdim=True)


def _a_part_read_later(m: nn.ModuleDict, x: Tensor) -> Tensor:
    y = F.relu(m["a"](x))
    part = y[:, 3:5]
    return torch.cat([F.relu(m["b"](F.relu(m["c"](y))) + y), part], 1)


def _of_the_input(m: nn.ModuleDict, x: Tensor) -> Tensor:
    return F.relu(m["b"](F.relu(m["a"](x[:, :16]))) + x)


@pytest.mark.parametrize("forward", [_multiplied_too, _read_later, _a_part_read_later, _of_the_input])
def test_a_residual_that_is_still_needed_is_not_written_to(forward: Callable[..., Tensor]) -> None:
    model = Of(forward, a=conv(16, 64, 1), b=conv(64, 64, 1), c=conv(64, 64, 1))
    assert _in_place(model, integers(2, 64 if forward is _of_the_input else 16, 9, 9)) == 0


def test_inductor_does_not_write_the_pointers_of_packed_layers_at_every_call() -> None:
    """It writes out constants of up to 8 elements as code; two groups have pointers of three."""
    model = Of(lambda m, x: m["b"](F.relu(m["a"](x))), a=conv(16, 32), b=conv(32, 48))
    x = integers(2, 16, 9, 9)
    gm, _ = stored(model, x)
    _, code = run_and_get_code(lambda: find_target("inductor").lower(gm, [x]))
    assert "shuffled_block_into" in code[0]
    assert "int64_t*" not in code[0]


@pytest.mark.slow
def test_packed_layers_run_in_inductor_s_c_wrapper() -> None:
    """What TORCHINDUCTOR_CPP_WRAPPER=1 switches on: no Python between the layers."""
    model = Of(lambda m, x: m["b"](F.relu(m["a"](x))), a=conv(16, 32), b=conv(32, 48))
    x = integers(2, 16, 9, 9)
    gm, _ = stored(model, x)
    with torch._inductor.config.patch(cpp_wrapper=True):
        run, code = run_and_get_code(lambda: find_target("inductor").lower(gm, [x]))
    assert re.search(r"fxsparse(::|\.)shuffled_block_into\W", code[0])  # torch 2.11 calls it by its name in Python
    assert torch.equal(run(x)[0], flat(gm)(x)[0])
