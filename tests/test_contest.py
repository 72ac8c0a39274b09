"""Who competes, what target="auto" stands for, and who is lowered a second time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxsparse
from fxsparse import VerificationError, contest
from fxsparse.backend import TARGETS
from fxsparse.backend.eager import Eager
from fxsparse.backend.inductor_cpp import FEWEST_CALLS, InductorCpp
from fxsparse.backend.target import Runnable
from fxsparse.deploy.onnx_runtime import OnnxSession
from fxsparse.ir.capture import capture
from fxsparse.ir.inputs import as_is, channels_last
from fxsparse.measure import Runs
from tests.test_compile import Net, agree, images, masks_of, zeroed
from tests.test_storage import Of, conv


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Quick(Eager):
    """Eager under another name, which is tried after it."""

    name = "quick"
    rivals = ("eager",)
    refines = "eager"

    def __init__(self, worthwhile: bool = True, fails: bool = False) -> None:
        self.asked: list[float] = []
        self.lowered: list[fx.GraphModule] = []
        self.is_worthwhile, self.fails = worthwhile, fails

    def worthwhile(self, gm: fx.GraphModule, ms: float) -> bool:
        self.asked.append(ms)
        return self.is_worthwhile

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        if self.fails:
            raise RuntimeError("no such instruction\nat line 7")
        self.lowered.append(gm)
        return super().lower(gm, inputs)


def compiled(monkeypatch: pytest.MonkeyPatch, quick: Quick, ms: Mapping[str, float]) -> fxsparse.SparseModule:
    """Compiled for eager with `quick` beside it; a build takes the milliseconds of the first name it contains."""

    def play_off(ours: Mapping[str, Callable[[], object]], rivals: Mapping[str, Callable[[], object]]) -> Runs:
        return Runs({name: [next(t for part, t in ms.items() if part in name)] * 6 for name in [*ours, *rivals]})

    monkeypatch.setitem(TARGETS, "quick", quick)
    monkeypatch.setattr("fxsparse.contest.play_off", play_off)
    model, x = Net(), images()
    fast = fxsparse.compile(model, masks_of(model), "eager", example_inputs=x)
    agree(fast(x), zeroed(model, masks_of(model))(x))
    return fast


SPARSE_GAINS = {"sparse: quick": 1.0, "sparse: eager": 2.0, "quick, channels_last": 3.0, "channels_last": 3.5, "": 4.0}


def test_both_winners_are_lowered_again_and_all_four_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Quick()
    fast = compiled(monkeypatch, quick, SPARSE_GAINS)
    report, build = fast.report, fast._built("test")
    assert quick.asked == [2.0]
    assert len(quick.lowered) == 2
    assert (report.chosen, report.sparse_ms, report.dense_ms) == ("sparse", 1.0, 3.0)  # not 3.5: the dense one gained
    assert {t.build for t in report.timings} == {
        "sparse: eager", "sparse: quick", "eager, contiguous", "eager, channels_last", "quick, channels_last",
    }  # fmt: skip
    assert (build.target.name, build.lowered_by and build.lowered_by.name) == ("eager", "quick")


def test_the_dense_build_may_win_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(monkeypatch, Quick(), SPARSE_GAINS | {"quick, channels_last": 0.5})
    assert (fast.report.chosen, fast.report.dense_ms) == ("dense", 0.5)
    lowered_by = fast._built("test").lowered_by
    assert lowered_by is not None
    assert lowered_by.name == "quick"


def test_what_is_lowered_again_brings_the_report_of_its_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime leads without formats; Inductor's build with them, close behind, gains by calls in C++."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("fxsparse.passes.choose_formats.FASTER", 1e9)  # every layer that can be is packed
    monkeypatch.setattr("fxsparse.backend.inductor_cpp.InductorCpp.worthwhile", lambda *_: True)
    times = {"sparse: onnx": 1.0, "sparse: inductor_cpp": 0.5, "sparse: inductor": 1.005, "": 4.0}
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32, :16] = mask[32:, 40:60] = True
    monkeypatch.setattr(sys.modules[__name__], "masks_of", lambda model: {"0.weight": mask})
    fast = auto(monkeypatch, times, model, torch.randn(3, 64), formats="auto")
    assert fast.report.sparse_ms == 0.5
    assert fast.report.rows[0].stored in ("shuffled_block", "unstructured")
    assert not any("without formats" in d.why for d in fast.report.decisions)


def test_rows_of_two_stages_are_not_merged_or_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is four times slower in the second stage; there a few rounds drop what was timed well before."""
    first = {"sparse: eager": [2.0] * 60, "eager, contiguous": [4.0] * 3, "eager, channels_last": [3.0] * 60}
    second = {"sparse: eager": [8.0, 7.0] * 20, "sparse: quick": [4.0, 6.0, 5.0, 3.0, 7.0] * 8,
              "eager, channels_last": [14.0] * 3, "quick, channels_last": [12.0, 6.0, 10.0, 6.0, 21.0] * 8}  # fmt: skip
    stages = iter([first, second])
    monkeypatch.setitem(TARGETS, "quick", Quick())
    monkeypatch.setattr("fxsparse.contest.play_off", lambda ours, rivals: Runs(next(stages)))
    report = fxsparse.compile(Net(), masks_of(Net()), "eager", example_inputs=images()).report
    assert {t.build: (t.median_ms, t.runs, t.together) for t in report.timings} == {
        "sparse: eager": (7.5, 40, True), "sparse: quick": (5.0, 40, True), "quick, channels_last": (10.0, 40, True),
        "eager, channels_last": (3.0, 60, False), "eager, contiguous": (4.0, 3, False),
    }  # fmt: skip
    together = {t.build: t.median_ms for t in report.timings if t.together}
    assert (report.dense_ms, report.sparse_ms) == (10.0, 5.0)
    assert report.dense_ms == min(ms for name, ms in together.items() if not name.startswith("sparse"))
    assert report.speedup_low is not None
    assert report.speedup_high is not None
    assert report.speedup == 2.0  # of 3, 1, 2, 2 and 3 within the rounds
    assert report.speedup_low <= 2.0 <= report.speedup_high
    assert "eager, channels_last *" in str(report)


def test_what_gains_nothing_by_it_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(monkeypatch, Quick(), SPARSE_GAINS | {"sparse: quick": 2.5})
    lowered_by = fast._built("test").lowered_by
    assert lowered_by is not None
    assert (lowered_by.name, fast.report.sparse_ms) == ("eager", 2.0)


@pytest.mark.parametrize(("eager_ms", "lowered"), [(1.05, True), (1.2, False)])
def test_a_close_second_is_lowered_again_too(monkeypatch: pytest.MonkeyPatch, eager_ms: float, lowered: bool) -> None:
    quick, gm = Quick(), layers(1)
    monkeypatch.setitem(TARGETS, "quick", quick)
    first = contest._Build("sparse: onnx", gm, gm, as_is, TARGETS["onnx"])
    second = contest._Build("sparse: eager", gm, gm, as_is, TARGETS["eager"])
    rival = contest._Build("eager, contiguous", gm, gm, as_is, TARGETS["eager"])
    runs = Runs({"sparse: onnx": [1.0], "sparse: eager": [eager_ms], "eager, contiguous": [3.0]})
    found = contest._refined([first, second], [rival], runs, [torch.randn(2, 4)])
    assert [b.name for b in found or ()] == (["sparse: quick", "quick, contiguous"] if lowered else [])


def test_the_rival_lowered_again_is_the_fastest_of_those_timed_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "quick", Quick())
    gm = layers(1)
    names = ["sparse: eager", "eager, contiguous", "eager, channels_last"]
    ours, *rivals = [contest._Build(name, gm, gm, as_is, TARGETS["eager"]) for name in names]
    runs = Runs({names[0]: [1.0] * 6, names[1]: [2.0] * 3, names[2]: [3.0] * 6})
    found = contest._refined([ours], rivals, runs, [torch.randn(2, 4)])
    assert [b.name for b in found or ()] == ["sparse: quick", "quick, channels_last"]


def test_where_it_is_not_worthwhile_nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Quick(worthwhile=False)
    fast = compiled(monkeypatch, quick, SPARSE_GAINS)
    assert quick.lowered == []
    assert (fast.report.sparse_ms, fast.report.dense_ms) == (2.0, 3.5)


@pytest.mark.parametrize(("sparse_ms", "chosen"), [(3.4, "dense"), (3.3, "dense"), (3.0, "sparse")])
def test_what_is_close_is_timed_longer_and_that_decides(
    monkeypatch: pytest.MonkeyPatch, sparse_ms: float, chosen: str
) -> None:
    """The first rounds say 3.4 or 3.3 or 3.0 against 3.5 ms; the many after them 3.6 against 3.5."""

    def interleave(builds: Mapping[str, Callable[[], object]], bounds: tuple[int, int]) -> Runs:
        return Runs({name: [3.6 if name.startswith("sparse") else 3.5] * 20 for name in builds})

    monkeypatch.setattr("fxsparse.measure.interleave", interleave)
    times = SPARSE_GAINS | {"sparse: eager": sparse_ms}
    report = compiled(monkeypatch, Quick(worthwhile=False), times).report
    assert report.chosen == chosen
    again = {"sparse: eager": 6, "eager, contiguous": 6, "eager, channels_last": 6}
    again |= {"sparse: eager": 26, "eager, channels_last": 26} if chosen == "dense" else {}
    assert {t.build: t.runs for t in report.timings} == again
    assert [t.build for t in report.timings if not t.together] == ["eager, contiguous"] * (chosen == "dense")


def test_a_compiler_that_fails_there_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fxsparse"):
        fast = compiled(monkeypatch, Quick(fails=True), SPARSE_GAINS)
    assert (fast.report.chosen, fast.report.sparse_ms) == ("sparse", 2.0)
    assert [r.getMessage() for r in caplog.records] == [
        "target 'quick' could not lower it: RuntimeError: no such instruction"
    ]


# ------------------------------------------------------------ inductor_cpp

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 5e-2}


def layers(count: int) -> fx.GraphModule:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count))).eval()
    return capture(model, (torch.randn(2, 4),), fxsparse.Masks(), dynamic_batch=False)


def test_calls_in_cpp_are_for_many_layers_that_take_little_time() -> None:
    target = InductorCpp()
    assert target.worthwhile(layers(FEWEST_CALLS), 1.0)
    assert not target.worthwhile(layers(FEWEST_CALLS), 100.0)
    assert not target.worthwhile(layers(FEWEST_CALLS - 1), 0.1)


@pytest.mark.parametrize("formats", ["dense", "shuffled_block"])
def test_packed_layers_gain_from_calls_in_cpp_where_weights_fill_the_caches(
    formats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = torch.block_diag(torch.ones(16, 16), torch.ones(16, 16)).bool()
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(FEWEST_CALLS))).eval()
    masks = {f"{i}.weight": blocks for i in range(FEWEST_CALLS)}
    options: dict[str, Any] = {"formats": formats, "measure": False, "verify": "off"}
    gm = fxsparse.compile(model, masks, "eager", example_inputs=torch.randn(2, 32), **options).graph_module
    assert InductorCpp().worthwhile(gm, 0.1) == (formats == "dense")
    monkeypatch.setattr("fxsparse.backend.inductor_cpp.FILLING", sum(b.nbytes for b in gm.buffers()) - 1)
    assert InductorCpp().worthwhile(gm, 0.1)
    assert not InductorCpp().worthwhile(gm, 100.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_function_with_calls_in_cpp(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Of(lambda m, y: m["c"](m["b"](m["a"](y).relu()).relu().mean((2, 3))), a=conv(3, 8), b=conv(8, 32),
               c=nn.Linear(32, 5)).to(dtype).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    packed: dict[str, Any] = {} if dtype == torch.float64 else {"formats": "shuffled_block"}
    eager = fxsparse.compile(model, {}, "eager", example_inputs=x, measure=False, **packed)
    fast = fxsparse.compile(model, {}, "inductor_cpp", example_inputs=x, measure=False, **packed)
    fast.save(tmp_path / "m")
    for module in (fast, fxsparse.load(tmp_path / "m")):
        for batch in (2, 5):
            other = torch.randn(batch, 3, 8, 8, dtype=dtype)
            torch.testing.assert_close(module(other), eager(other), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# target="auto"


def auto(
    monkeypatch: pytest.MonkeyPatch, ms: Mapping[str, float], model: nn.Module, x: Tensor, formats: str = "dense"
) -> fxsparse.SparseModule:
    """Compiled for "auto", with the milliseconds of the first name that a build's contains."""

    def play_off(ours: Mapping[str, Callable[[], object]], rivals: Mapping[str, Callable[[], object]]) -> Runs:
        return Runs({name: [next(t for part, t in ms.items() if part in name)] * 6 for name in [*ours, *rivals]})

    monkeypatch.setattr("fxsparse.contest.play_off", play_off)
    return fxsparse.compile(model, masks_of(model), "auto", example_inputs=x, formats=formats)


ONNX_WINS = {"sparse: onnx": 1.0, "sparse": 2.0, "onnx": 3.0, "": 4.0}


def test_auto_takes_what_is_fastest_for_any_batch_and_after_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Net()
    fast = auto(monkeypatch, ONNX_WINS, model, images())
    report = fast.report
    assert (report.target, report.chosen, report.sparse_ms, report.dense_ms) == ("auto", "sparse", 1.0, 3.0)
    assert {"sparse: inductor", "sparse: onnx", "onnx, contiguous", "inductor, channels_last"} <= {
        t.build for t in report.timings
    }
    (ran,) = [d for d in report.decisions if d.step == "contest"]
    assert str(ran) == "contest: target 'auto': run it on 'onnx' (sparse: onnx was measured fastest)"
    fast.save(path := tmp_path / "auto.fxsparse")
    for module in (fast, fxsparse.load(path)):
        for batch in (2, 1, 5):
            x = images(batch)
            agree(module(x), zeroed(model, masks_of(model))(x))
        build = module._built("test")
        assert build.lowered_by is not None
        assert (build.target.name, build.lowered_by.name) == ("auto", "onnx")
    assert isinstance(fast._built("test").any_batch, OnnxSession)


@pytest.mark.parametrize("target", ["auto", "eager"])
def test_eager_may_win_in_channels_last_and_is_timed_with_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str
) -> None:
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x)
        return channels_last(x)

    monkeypatch.setattr("fxsparse.ir.inputs.channels_last", spy)
    monkeypatch.setattr("fxsparse.contest.on_gpu", lambda gm: True)  # on CPUs it is no runner of auto's
    model, x = Net(), images()

    def play_off(ours: Mapping[str, Callable[[], object]], rivals: Mapping[str, Callable[[], object]]) -> Runs:
        before = len(seen)
        for build in rivals.values():
            build()
        assert len(seen) == before
        ours["sparse: eager, channels_last"]()
        assert len(seen) == before + 1
        return Runs({name: [1.0 if name == "sparse: eager, channels_last" else 2.0] * 6 for name in [*ours, *rivals]})

    monkeypatch.setattr("fxsparse.contest.play_off", play_off)
    fast = fxsparse.compile(model, masks_of(model), target, example_inputs=x, formats="dense")
    assert (fast.report.chosen, fast.report.sparse_ms, fast.report.dense_ms) == ("sparse", 1.0, 2.0)
    fast.save(tmp_path / "m")
    for module in (fast, fxsparse.load(tmp_path / "m")):
        for batch in (2, 5):
            other = images(batch)
            agree(module(other), zeroed(model, masks_of(model))(other))


def test_auto_may_end_in_a_dense_onnx_build(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = Net(), images()
    fast = auto(monkeypatch, {"sparse": 3.0, "onnx": 1.0, "": 4.0}, model, x)
    assert (fast.report.chosen, fast.report.dense_ms) == ("dense", 1.0)
    agree(fast(x), zeroed(model, masks_of(model))(x))


def test_packed_layers_compete_with_dense_ones_in_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("fxsparse.passes.choose_formats.FASTER", 1e9)  # every layer that can be is packed
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32, :16] = mask[32:, 40:60] = True
    x = torch.randn(3, 64)
    monkeypatch.setattr(sys.modules[__name__], "masks_of", lambda model: {"0.weight": mask})
    wins = {"sparse: inductor": 1.0, **ONNX_WINS}
    for ms, stored in ((wins, {"shuffled_block", "unstructured"}), (ONNX_WINS, {"dense"})):
        fast = auto(monkeypatch, ms, model, x, formats="auto")
        assert {"sparse: inductor", "sparse: onnx, dense weights"} <= {t.build for t in fast.report.timings}
        assert fast.report.rows[0].stored in stored
        agree(fast(x), zeroed(model, {"0.weight": mask})(x))


@pytest.mark.parametrize("missing", [True, False])
def test_what_onnx_cannot_run_is_left_to_inductor_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    else:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, x = Net(), images()
    if not missing:  # no kernels for it there
        model, x = model.bfloat16(), x.bfloat16()
    fast = auto(monkeypatch, ONNX_WINS, model, x)
    why, ran = [d for d in fast.report.decisions if d.step == "contest"]
    assert (why.accepted, ran.accepted, ran.what) == (False, True, "run it on 'inductor'")
    assert ("onnxruntime" if missing else "NotImplemented") in why.why
    assert fast.report.chosen == "sparse"
    assert not any("onnx" in t.build for t in fast.report.timings)


def test_auto_does_without_inductor_where_its_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("torch._inductor.compile", fails)
    model, x = Net(), images()
    fast = auto(monkeypatch, ONNX_WINS, model, x)
    why, ran = [d for d in fast.report.decisions if d.step == "contest"]
    assert (why.why, ran.what) == ("RuntimeError: no such instruction", "run it on 'onnx'")
    agree(fast(x), zeroed(model, masks_of(model))(x))


def test_auto_does_without_what_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = OnnxSession.__call__
    monkeypatch.setattr(OnnxSession, "__call__", lambda self, *inputs: [y + 1 for y in run(self, *inputs)])
    model, x = Net(), images()
    fast = auto(monkeypatch, ONNX_WINS, model, x)
    agree(fast(x), zeroed(model, masks_of(model))(x))
    (why,) = [d for d in fast.report.decisions if d.step == "contest"]
    assert (why.where, why.accepted) == ("target 'onnx'", False)
    assert "it gives" in why.why
    with pytest.raises(VerificationError):
        fxsparse.compile(model, masks_of(model), "onnx", example_inputs=x, measure=False)


def test_unmeasured_auto_is_inductor() -> None:
    fast = fxsparse.compile(Net(), masks_of(Net()), "auto", example_inputs=images(), measure=False)
    lowered_by = fast._built("test").lowered_by
    assert lowered_by is not None
    assert lowered_by.name == "inductor"
