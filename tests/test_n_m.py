"""N:M weights: recognized, packed and multiplied, against float64 and against PyTorch's own operators."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxsparse
from fxsparse.errors import InputError
from fxsparse.formats import FORMATS, semi_structured, semi_structured_search
from fxsparse.formats.gpu import for_gpu
from fxsparse.formats.n_m import NM, PATTERNS, columns_of, misfits, pack, recognize, unpack
from fxsparse.formats.n_m_op import multiply, n_m, n_m_into, reference
from fxsparse.formats.semi_structured_search import DEFAULT, search
from fxsparse.ir.capture import capture
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import call_nodes, flat, get_tensor
from fxsparse.ir.masks import Masks
from fxsparse.kernels import build
from fxsparse.kernels.cpu import n_m as kernel
from fxsparse.measure import LayerTimes
from fxsparse.passes import STORAGE, Context, canonicalize, run
from tests.test_shuffled_block import allowed, torch_threads

KERNEL = kernel.PATTERNS


def n_m_mask(shape: tuple[int, ...], n: int, m: int, seed: int, fewer: float = 0.0) -> Tensor:
    """At most n of every m along dimension 1, exactly n where `fewer` is 0. A share `fewer` of the groups is empty."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.rand(shape[0], *shape[2:], shape[1] // m, m, generator=g)
    mask = groups.argsort(-1) < n
    mask &= torch.rand(groups.shape[:-1], generator=g)[..., None] >= fewer
    return mask.flatten(-2).movedim(-1, 1).contiguous()


def weight(rows: int, columns: int, n: int, m: int, seed: int = 0, fewer: float = 0.0) -> Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return w * n_m_mask((rows, columns), n, m, seed, fewer)


def own_error(own: Tensor, exact: Tensor, size: float = 0.0) -> float:
    """What may be off. The dense float64 product is itself what is compared with: there a few roundings are allowed.

    size  of a sum of such terms without their signs: a result that happens to be near zero was rounded like the others
    """
    if not exact.numel():
        return 0.0
    ulp = torch.finfo(own.dtype).eps * max(size, float(exact.abs().max()))
    return 64 * ulp if own.dtype == torch.float64 else max(allowed(own, exact), 4 * ulp)


def agrees(w: Tensor, x: Tensor, bias: Tensor | None, n: int) -> None:
    got = multiply(pack(w, n, 4), x, bias)
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    own = F.linear(x, w, bias)
    assert got.shape == exact.shape
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    off = float((got.double() - exact).abs().max()) if exact.numel() else 0.0
    size = float(F.linear(x.double() ** 2, w.double() ** 2).max().sqrt()) if exact.numel() else 0.0
    assert off <= own_error(own, exact, size), f"off by {off:.2e}, allowed {own_error(own, exact, size):.2e}"


# ------------------------------------------------------------ recognized


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("taps", [(), (3, 3)])
def test_a_pattern_is_recognized_from_the_mask_alone(n: int, m: int, taps: tuple[int, ...]) -> None:
    assert recognize(n_m_mask((32, 24, *taps), n, m, seed=1)) == (n, m)


def test_the_sparsest_pattern_is_named() -> None:
    assert recognize(torch.zeros(4, 8)) == (1, 4)
    assert recognize(torch.eye(8) > 0) == (1, 4)
    assert recognize(torch.tensor([[True, True, False, False] * 2])) == (2, 4)
    assert recognize(torch.tensor([[True, False, True, False] * 2])) == (1, 2)


@pytest.mark.parametrize("mask", [torch.ones(4, 8), torch.zeros(4, 7), torch.zeros(8), torch.zeros(3, 1, 3, 3)])
def test_what_has_no_pattern_is_not_recognized(mask: Tensor) -> None:
    assert recognize(mask > 0) is None


def test_one_group_too_full_is_enough() -> None:
    mask = n_m_mask((16, 64), 2, 4, seed=0)
    mask[5, 8:12] = True
    assert misfits(mask, 2, 4) == 1
    assert recognize(mask) is None


# ------------------------------------------------------------ packed


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*PATTERNS, (3, 4), (1, 8), (2, 8), (8, 16)]), st.integers(1, 70), st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]),
    st.integers(0, 999),
)  # fmt: skip
def test_packing_is_exact(
    pattern: tuple[int, int], rows: int, count: int, fewer: float, dtype: torch.dtype, seed: int
) -> None:
    n, m = pattern
    w = weight(rows, count * m, n, m, seed, fewer).to(dtype)
    packed = pack(w, n, m)
    assert torch.equal(unpack(packed), w)
    assert unpack(packed).dtype == dtype
    assert packed.values.shape == (-(-rows // 16), count, n, 16)
    assert packed.nse == packed.values.numel()


def test_the_codes_of_a_two_four_weight_are_these() -> None:
    w = torch.tensor([[0.0, 5, 0, 7, 1, 2, 0, 0]])
    packed = pack(w, 2, 4)
    assert packed.values[0, :, :, 0].tolist() == [[5, 7], [1, 2]]
    assert columns_of(packed)[0, :, :, 0].tolist() == [[1, 3], [0, 1]]
    assert int(packed.codes[0, 0, 0]) == 0b0100_1101


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-45])
def test_odd_values_are_weights_too(value: float) -> None:
    w = torch.zeros(3, 8)
    w[2, 6] = value
    assert torch.equal(unpack(pack(w, 1, 4)).nan_to_num(7.0), w.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("w", "n", "m", "message"),
    [
        (torch.ones(4, 8), 2, 4, "expected at most 2 nonzeros in every 4 columns; got 8 of 8 groups with more"),
        (torch.zeros(4, 6), 2, 4, r"expected \[O, I\] or .* I a multiple of 4; got shape \(4, 6\)"),
        (torch.zeros(4, 8, 3, 3), 2, 4, r"expected \[O, I\]; got shape \(4, 8, 3, 3\)"),
        (torch.zeros(4, 8), 4, 4, "expected N:M with 0 < N < M"),
        (torch.zeros(4, 6), 1, 3, "M one of 2, 4, 8, 16; got N 1 and M 3"),
        (torch.zeros(4, 8), True, 4, "got N True and M 4"),
    ],
)
def test_what_does_not_fit_the_pattern_is_refused(w: Tensor, n: int, m: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack(w, n, m)


DAMAGE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "fewer values": ("values", lambda t: t[:, :-1]),
    "codes of another type": ("codes", lambda t: t.long()),
    "fewer codes": ("codes", lambda t: t[:, :-1]),
    "columns out of order": ("codes", torch.zeros_like),
    "another shape": ("shape", lambda s: (s[0], s[1] + 2)),
    "another pattern": ("n", lambda n: n + 1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_arrays_are_refused(what: str) -> None:
    packed = pack(weight(40, 64, 2, 4), 2, 4)
    name, damage = DAMAGE[what]
    with pytest.raises(InputError, match="expected arrays that fit each other; got "):
        dataclasses.replace(packed, **{name: damage(getattr(packed, name))})


# ------------------------------------------------------------ multiplied


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([1, 2]), st.integers(1, 70), st.integers(1, 90), st.lists(st.integers(1, 11), max_size=2),
    st.booleans(), st.sampled_from([0.0, 0.5]), st.integers(0, 999),
)  # fmt: skip
def test_any_linear_layer_agrees_with_the_dense_one(
    n: int, rows: int, quads: int, lead: list[int], bias: bool, fewer: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, b = torch.randn(*lead, 4 * quads, generator=g), torch.randn(rows, generator=g) if bias else None
    agrees(weight(rows, 4 * quads, n, 4, seed, fewer), x, b, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 17])
@pytest.mark.parametrize("threads", [1, 2])
def test_layers_as_they_are_agree(dtype: torch.dtype, n: int, tokens: int, threads: int) -> None:
    with torch_threads(threads):
        g = torch.Generator().manual_seed(tokens)
        x, bias = torch.randn(tokens, 3072, generator=g).to(dtype), torch.randn(200, generator=g).to(dtype)
        agrees(weight(200, 3072, n, 4).to(dtype), x, bias, n)


@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_narrower_vectors_give_the_same(isa: str, dtype: torch.dtype) -> None:
    if isa == "AVX2" and build.instruction_set() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    torch.manual_seed(0)
    for n, tokens, columns in ((1, 1, 100), (2, 1, 1500), (2, 7, 68)):
        w, x = weight(45, columns, n, 4).to(dtype), torch.randn(tokens, columns).to(dtype)
        packed, y = pack(w, n, 4), torch.empty(tokens, 45, dtype=dtype)
        kernel.run(x, y, packed.values, packed.codes, None, isa=isa)
        exact = F.linear(x.double(), w.double())
        assert float((y.double() - exact).abs().max()) <= own_error(F.linear(x, w), exact)


def test_each_token_and_row_is_its_own() -> None:
    """One weight in each column in turn, distinct inputs: a wrong code, row or token cannot cancel out."""
    w = torch.zeros(40, 64)
    for row in range(40):
        w[row, (row * 7) % 64] = row + 1
    x = torch.arange(11 * 64.0).view(11, 64)
    assert torch.equal(multiply(pack(w, 2, 4), x), F.linear(x, w))


def test_a_batch_of_nothing_gives_nothing() -> None:
    assert multiply(pack(torch.zeros(5, 8), 2, 4), torch.empty(0, 8)).shape == (0, 5)


def test_an_input_that_is_not_contiguous_is_read_right() -> None:
    packed, x = pack(weight(20, 32, 2, 4), 2, 4), torch.randn(32, 5).t()
    assert torch.equal(multiply(packed, x), multiply(packed, x.contiguous()))


@pytest.mark.parametrize(
    ("n", "m", "dtype"), [(4, 8, torch.float32), (1, 2, torch.float32), (3, 4, torch.float32), (2, 4, torch.float16)]
)
def test_what_has_no_kernel_runs_dense(n: int, m: int, dtype: torch.dtype) -> None:
    w, x = weight(20, 32, n, m).to(dtype), torch.randn(3, 32).to(dtype)
    assert torch.equal(multiply(pack(w, n, m), x), F.linear(x, w))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.ones(3, 30), None, r"x of an N:M .*: expected 32 columns in the last dimension; got shape \(3, 30\)"),
        (torch.tensor(1.0), None, "x of an N:M product"),
        (torch.ones(3, 32), torch.ones(3), r"bias of an .*: expected torch.float32 \[20\]; got torch.float32 \[3\]"),
        (torch.ones(3, 32), torch.ones(20).double(), r"got torch.float64 \[20\]"),
    ],
)
@pytest.mark.parametrize("call", [n_m, reference])
def test_what_the_kernel_would_read_past_the_end_of_is_refused(
    call: Any, x: Tensor, bias: Tensor | None, message: str
) -> None:
    packed = pack(weight(20, 32, 2, 4), 2, 4)
    with pytest.raises(InputError, match=message):
        call(x, packed.values, packed.codes, bias, [20, 32], 2, 4)


def test_the_operators_keep_the_rules_of_torch_library() -> None:
    packed = pack(weight(20, 32, 2, 4), 2, 4)
    for bias in (None, torch.randn(20)):
        arguments = (torch.randn(2, 3, 32), packed.values, packed.codes, bias, [20, 32], 2, 4)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(n_m, arguments, test_utils=tests)
        torch.testing.assert_close(n_m(*arguments), reference(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 2])
def test_the_operator_in_cpp_gives_what_the_one_in_python_does(dtype: torch.dtype, n: int) -> None:
    packed = pack(weight(37, 64, n, 4).to(dtype), n, 4)
    for x, bias in ((torch.randn(3, 64), None), (torch.randn(64, 3).T, torch.randn(37))):
        arguments = (x.to(dtype), packed.values, packed.codes, None if bias is None else bias.to(dtype), [37, 64], n, 4)
        out = torch.full([*x.shape[:-1], 37], torch.nan, dtype=dtype)
        n_m_into(*arguments[:4], 37, 64, n, 4, out)
        assert torch.equal(out, n_m(*arguments))


MISFITS: dict[str, dict[str, Any]] = {
    "columns of x": {"x": torch.ones(2, 28)},
    "dtype of x": {"x": torch.ones(2, 32).int()},
    "another dtype than the values": {"x": torch.ones(2, 32).double()},
    "a short bias": {"bias": torch.ones(19)},
    "a short output": {"out": torch.ones(1, 20)},
    "an output of another dtype": {"out": torch.ones(2, 20).double()},
    "an output that is not contiguous": {"out": torch.ones(20, 2).T},
    "values of another weight": {"rows": 40, "out": torch.ones(2, 40)},
    "another pattern": {"m": 8},
}


@pytest.mark.parametrize("what", MISFITS)
def test_the_operator_in_cpp_refuses_what_it_would_read_past_the_end_of(what: str) -> None:
    packed = pack(weight(20, 32, 2, 4), 2, 4)
    good = {"x": torch.ones(2, 32), "values": packed.values, "codes": packed.codes, "bias": None, "rows": 20,
            "columns": 32, "n": 2, "m": 4, "out": torch.ones(2, 20)}  # fmt: skip
    n_m_into(**good)
    with pytest.raises(RuntimeError, match=r"fxsparse::n_m: expected .*; got x .* and an output "):
        n_m_into(**good | MISFITS[what])


# ------------------------------------------------------------ chosen


class Of(nn.Module):
    def __init__(self, forward: Callable[[nn.ModuleDict, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


def linear(columns: int, rows: int, n: int = 2, m: int = 4, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.mul_(n_m_mask((rows, columns), n, m, seed))
    return layer


def decided(model: nn.Module, x: Tensor, ctx: Context) -> tuple[fx.GraphModule, dict[tuple[str, str], Decision]]:
    gm = capture(model.eval(), (x,), Masks(), dynamic_batch=True)
    decisions = run(gm, [canonicalize, *STORAGE], ctx)
    chosen = {(d.where, d.what): d for d in decisions if d.step == "choose_formats"}
    return gm, chosen


def test_a_layer_that_is_not_two_four_says_why() -> None:
    model = Of(
        lambda m, x: m["odd"](m["full"](m["conv"](x).flatten(1))),
        conv=nn.Conv2d(4, 8, 1), full=nn.Linear(32, 6), odd=nn.Linear(6, 5),
    )  # fmt: skip
    with torch.no_grad():
        for layer in model.layers.values():
            layer.weight.view(-1)[0] = 0
    _, found = decided(model, torch.randn(1, 4, 2, 2), Context(formats=("n_m",)))
    assert [d.why for d in found.values()] == [
        "only linear layers have this kernel",
        "not 2:4: 48 of 48 groups of 4 columns keep more than 2",
        "6 columns are no multiple of 4",
    ]


@pytest.mark.parametrize(("tokens", "accepted"), [(1, True), (4, True), (5, False), (197, False)])
def test_without_a_timer_only_few_tokens_are_believed_to_gain(tokens: int, accepted: bool) -> None:
    model = Of(lambda m, x: m["a"](x), a=linear(64, 64))
    _, found = decided(model, torch.randn(1, tokens, 64), Context(formats=("n_m",)))
    (decision,) = found.values()
    assert decision.accepted == accepted
    assert decision.why == ("50% of the work, not timed" if accepted else
                            f"{tokens} tokens share its weights: only a timing can tell")  # fmt: skip


@pytest.mark.parametrize(("block_s", "n_m_s", "best"), [(1.0, 0.5, "n_m"), (0.4, 0.5, "shuffled_block")])
def test_of_two_formats_the_faster_is_chosen(block_s: float, n_m_s: float, best: str) -> None:
    layer = linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:1].expand(64, 64))  # all rows keep the same columns: both formats fit
    times = {"NM": n_m_s, "ShuffledBlock": block_s}
    ctx = Context(lambda *_: 2.0, lambda _, packed: times[type(packed).__name__], ("shuffled_block", "n_m"))
    gm, found = decided(Of(lambda m, x: m["a"](x), a=layer), torch.randn(1, 64), ctx)
    assert {d.what for d in found.values() if d.accepted} == {f"store as {best}"}
    (lost,) = [d for d in found.values() if not d.accepted]
    assert lost.why.endswith(f"; {best} is faster")
    assert [n.target.name() for n in gm.graph.nodes if "fxsparse" in str(n.target)] == [f"fxsparse::{best}"]


def test_the_columns_of_an_n_m_weight_are_not_renumbered() -> None:
    """The shuffled rows of `a` would be put in order by permuting the columns of `b`, which are in groups of four."""
    rows, kept = torch.randperm(64, generator=torch.Generator().manual_seed(0)), nn.Linear(64, 64)
    with torch.no_grad():
        kept.weight[rows[:32], :32] = 0
        kept.weight[rows[32:], 32:] = 0
    model, x = Of(lambda m, x: m["b"](F.relu(m["a"](x))), a=kept, b=linear(64, 64)), torch.randn(3, 64)

    def seconds(node: fx.Node, packed: object, **_: bool) -> float:
        return 1.0 if isinstance(packed, NM) or ".a." in str(node.args[1].target) else 2.0  # type: ignore[union-attr]

    ctx = Context(lambda *_: 9.0, seconds, ("shuffled_block", "n_m"))
    gm = capture(model.eval(), (x,), Masks(), dynamic_batch=True)
    decisions = run(gm, [canonicalize, *STORAGE], ctx)
    stored = {(d.where, d.data["format"]) for d in decisions if d.accepted and d.step == "choose_formats"}
    assert stored == {("layers.a.weight", "shuffled_block"), ("layers.b.weight", "n_m")}
    (refused,) = [d for d in decisions if d.step == "permute_channels"]
    assert not refused.accepted
    assert refused.why == "layers.b is stored by which of its columns are neighbors"
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_layer_is_timed_in_its_format_and_remembered(tmp_path: Any) -> None:
    gm = capture(
        Of(lambda m, x: m["a"](x), a=linear(64, 64)).eval(), (torch.randn(2, 64),), Masks(), dynamic_batch=True
    )
    node = next(n for n in gm.graph.nodes if "linear" in str(n.target))
    times = LayerTimes(tmp_path, batch=2)
    packed = pack(linear(64, 64).weight, 2, 4)
    seconds = times.of_format(node, packed)
    times.save()
    assert LayerTimes(tmp_path, batch=2).seconds == times.seconds != {}
    assert times.of_format(node, packed) == seconds > 0


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_with_n_m_gives_the_masked_model_at_any_batch_size(target: str, dtype: torch.dtype) -> None:
    model = Of(lambda m, x: m["b"](F.relu(m["a"](x))), a=linear(64, 128), b=linear(128, 64, 1)).eval().to(dtype)
    fast = fxsparse.compile(model, target=target, example_inputs=torch.randn(2, 64).to(dtype), formats="n_m",
                            measure=False, verify="each")  # fmt: skip
    assert [(r.stored, r.params_after) for r in fast.report.rows] == [("n_m", 64 * 64), ("n_m", 128 * 64 // 4)]
    for batch in (2, 5, 1):
        x = torch.randn(batch, 64).to(dtype)
        with torch.no_grad():
            got, exact = fast(x).double(), model.double()(x.double())
        torch.testing.assert_close(got, exact, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
        model.to(dtype)


# ------------------------------------------------------------ CUDA: only shapes are checked here


def test_the_operator_for_cuda_gives_the_right_shape() -> None:
    with FakeTensorMode():
        cuda = {"device": "cuda", "dtype": torch.float16}
        x, compressed = torch.empty(3, 5, 64, **cuda), torch.empty(96, 36, **cuda)
        for bias in (None, torch.empty(96, **cuda)):
            assert semi_structured._cuda(x, compressed, bias, 96).shape == (3, 5, 96)
            assert semi_structured.semi_structured(x, compressed, bias, 96).shape == (3, 5, 96)


def test_a_graph_for_a_gpu_has_its_own_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Of(lambda m, x: m["a"](x), a=linear(256, 128)).eval(), torch.randn(2, 3, 256)
    fast = fxsparse.compile(model, target="eager", example_inputs=x, formats="n_m", measure=False)
    for available in (False, True):
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
        gm = for_gpu(flat(fast.graph_module))
        calls = list(call_nodes(gm, semi_structured.semi_structured))
        assert len(calls) == available
        for call in calls:
            assert torch.equal(get_tensor(gm, str(call.args[1].target)), model.layers["a"].weight)
            assert [str(call.args[0].args[0]), str(call.args[2].target), call.args[3]] == ["x", "layers.a.bias", 128]


def test_arrays_on_a_gpu_are_checked_there() -> None:
    packed = pack(weight(16, 8, 2, 4), 2, 4)
    with FakeTensorMode():
        codes = torch.empty(packed.codes.shape, dtype=torch.int32, device="cuda")
        assert columns_of(SimpleNamespace(codes=codes, n=2, m=4, shape=(16, 8))).device.type == "cuda"


def outcomes(monkeypatch: pytest.MonkeyPatch, *results: Any) -> list[list[str]]:
    """The process that searches, played: what it prints, or how it ends. Gives the commands it was called with."""
    called: list[list[str]] = []
    left = iter(results)

    def run(words: list[str], **_: Any) -> Any:
        called.append(words)
        result = next(left)
        if isinstance(result, Exception):
            raise result
        return subprocess.CompletedProcess(words, 0, result, "")

    monkeypatch.setattr(subprocess, "run", run)
    return called


def test_an_algorithm_that_another_process_found_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    died, hung = subprocess.CalledProcessError(-6, "search"), subprocess.TimeoutExpired("search", 1)
    called = outcomes(monkeypatch, "a warning\n17\n", died, hung, "", "no number", OSError("no such program"))
    device = torch.device("cuda:1")
    found = [search(128, 256, 8, torch.float16, device) for _ in range(6)]
    assert found == [17, *[DEFAULT] * 5]
    assert called[0][-5:] == ["128", "256", "8", "float16", "cuda:1"]
    for name, value in (("executable", ""), ("frozen", True)):  # nothing that could be started
        monkeypatch.setattr(sys, name, value, raising=False)
        assert search(128, 256, 8, torch.float16, device) == DEFAULT
    assert len(called) == 6


def test_it_is_searched_once_and_never_inside_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    called = outcomes(monkeypatch, "17", "18")
    monkeypatch.setattr(semi_structured, "_FOUND", {})
    capturing, x, compressed = False, torch.empty(8, 64, dtype=torch.float16), torch.empty(96, 36)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    ask = partial(semi_structured._algorithm, compressed, x)
    assert (ask(), called) == (DEFAULT, [])
    monkeypatch.setattr(semi_structured, "SEARCHING", SimpleNamespace(get=lambda: True))
    capturing = True
    assert (ask(), called) == (DEFAULT, [])
    capturing = False
    assert (ask(), ask(), len(called)) == (17, 17, 1)
    capturing = True
    assert ask() == 17


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_the_process_that_searches_comes_as_far_as_the_device() -> None:
    words = [sys.executable, "-P", semi_structured_search.__file__, "128", "256", "8", "float16", "cuda:0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch._C._cuda_init()" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 197])
def test_two_four_on_a_gpu_agrees_with_the_dense_product(dtype: torch.dtype, tokens: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = Of(lambda m, x: m["a"](x), a=linear(256, 128)).eval().to("cuda", dtype)
    x = torch.randn(2, tokens, 256, device="cuda", dtype=dtype)
    fast = fxsparse.compile(model, target="eager", example_inputs=x, formats="n_m", measure=False)
    assert [r.stored for r in fast.report.rows] == ["n_m"]
    with torch.no_grad():
        own, exact = model(x), model.double()(x.double())
        assert float((fast(x).double() - exact).abs().max()) <= allowed(own, exact)


def test_the_format_is_registered() -> None:
    assert FORMATS["n_m"].reads_in_order
    assert not FORMATS["shuffled_block"].reads_in_order
    assert isinstance(FORMATS["n_m"].pack(weight(16, 8, 2, 4)), NM)
