"""Target "tensorrt" on a recording fake; what is exported without TensorRT; and, marked, the real thing."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.backend import tensorrt as target
from fxsparse.deploy import tensorrt_api
from fxsparse.deploy.onnx_model import OnnxModel, to_onnx
from fxsparse.deploy.tensorrt_api import TensorRT
from fxsparse.deploy.tensorrt_build import Gpu, Profile
from fxsparse.deploy.tensorrt_runtime import TensorRtModule
from fxsparse.errors import InputError, TargetError, VerificationError
from tests.fake_tensorrt import FakeTensorRT, plans
from tests.test_onnx import two_four

GPU = Gpu("A GPU", (9, 0), "13.0")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeTensorRT) -> FakeTensorRT:
    """As if `fake` were installed and the CPU a GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", cast(Any, fake))
    monkeypatch.setattr(target, "has_gpu", lambda: True)
    monkeypatch.setattr(target, "DEVICE", "cpu")
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda: GPU))
    monkeypatch.setattr(TensorRtModule, "_stream", lambda self, device: 77)
    return fake


def half(**options: Any) -> fxsparse.SparseModule:
    """A model with one 2:4 weight, in float16."""
    torch.manual_seed(0)
    model = Net().half().eval()
    masks = {"a.weight": two_four(model.a.weight)}
    options = {"measure": False, "formats": "dense", **options}
    return fxsparse.compile(model, masks, "tensorrt", example_inputs=torch.randn(4, 16).half(), **options)


def onnx_of(dtype: torch.dtype, mask: Any = two_four) -> OnnxModel:
    torch.manual_seed(0)
    model = Net().to(dtype).eval()
    options: Any = {"formats": "dense", "example_inputs": torch.randn(4, 16, dtype=dtype), "measure": False}
    return to_onnx(fxsparse.compile(model, {"a.weight": mask(model.a.weight)}, "eager", **options).graph_module)


@pytest.fixture(scope="module")
def model() -> OnnxModel:
    return onnx_of(torch.float16)


def opened(fake: FakeTensorRT, model: OnnxModel, **options: Any) -> TensorRtModule:
    """An engine for batches of four, which ran once."""
    module = TensorRtModule(cast(TensorRT, fake), model, Profile(4, 4, 4), **{"sparse": True, **options})
    (y,) = module(torch.randn(4, 16).half())
    assert y.shape == (4, 8)
    return module


def test_calls_come_in_order_with_strong_types_and_a_profile(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeTensorRT())
    fast = half()
    assert fake.calls[:9] == [
        ("create_network", 1 << 3),
        ("parse_from_file",),
        ("set_flag", "SPARSE_WEIGHTS"),
        ("set_shape", "x", (4, 16), (4, 16), (4, 16)),
        ("add_optimization_profile",),
        ("set_timing_cache", b"", False),
        ("build_serialized_network", fake.ProfilingVerbosity.DETAILED),
        ("deserialize_cuda_engine",),
        ("set_input_shape", "x", (4, 16)),
    ]
    assert ("execute_async_v3", 77) in fake.calls
    assert fast.report.target == "tensorrt"
    assert "largest |difference|" in fast.report.verification


def test_another_batch_size_has_an_engine_of_its_own_and_a_larger_one_another(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, FakeTensorRT())
    fast, model = half(), Net().half().eval()
    torch.manual_seed(0)
    model.load_state_dict(Net().half().state_dict())
    model.a.weight.data.mul_(two_four(model.a.weight))
    for batch in (4, 3, 64, 65):
        x = torch.randn(batch, 16).half()
        torch.testing.assert_close(fast(x), model(x), atol=2e-3, rtol=2e-3)
    shapes = [call[2:] for call in fake.calls if call[0] == "set_shape"]
    assert shapes == [((4, 16),) * 3, ((1, 16), (16, 16), (64, 16)), ((1, 16), (65, 16), (128, 16))]
    assert fake.names.count("build_serialized_network") == 3
    assert fake.calls[[c[0] for c in fake.calls].index("set_timing_cache", 8)][1] == b"times"  # from the build before


PICKED = "(Sparsity) TRT inference plan picked sparse implementation for layers: {} + ReLU"
ELIGIBLE = "(Sparsity) Layers eligible for sparse math: {} + ReLU, another"


@pytest.mark.parametrize(
    ("said", "picked", "why"),
    [
        ((ELIGIBLE, PICKED), True, "says that it picked"), ((ELIGIBLE,), False, "timed a dense kernel as faster"),
        ((), False, "does not name it as eligible"),
        (("(Sparsity) Layers eligible for sparse math: x{}",), False, "not name"),
    ],
)  # fmt: skip
def test_the_log_says_what_became_of_every_two_four_weight(
    said: tuple[str, ...], picked: bool, why: str, model: OnnxModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(n.name for n in model.proto.graph.node if n.op_type == "Gemm")
    install(monkeypatch, FakeTensorRT())
    for _ in range(2):  # the second time from the cache
        fake = FakeTensorRT(said=tuple(line.format(first) for line in said))
        (decision,) = opened(fake, model).decisions
        assert (decision.where, decision.accepted) == ("a.weight", picked)
        assert why in decision.why
    assert fake.names.count("build_serialized_network") == 0


def test_float32_and_dense_weights_do_not_ask_for_sparse_kernels(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeTensorRT())
    full = TensorRtModule(cast(TensorRT, fake), onnx_of(torch.float32), Profile(4, 4, 4), sparse=True)
    assert [(d.where, d.accepted) for d in full.decisions] == [("a.weight", False)]
    assert "its weight is FLOAT;" in full.decisions[0].why
    assert opened(fake, onnx_of(torch.float16, torch.ones_like)).decisions == ()
    assert "set_flag" not in fake.names


def test_the_dense_build_to_compare_with_is_built_without_sparse_weights(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, FakeTensorRT())
    fast = half(measure=True)
    assert {t.build for t in fast.report.timings} == {"tensorrt, contiguous", "sparse: tensorrt"}
    assert fake.names.count("build_serialized_network") == 2
    assert fake.names.count("set_flag") == 1


def test_plans_are_kept_and_found_again_until_anything_changes(
    model: OnnxModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def builds(fake: FakeTensorRT, **options: Any) -> int:
        opened(fake, options.pop("model", model), **options)
        return fake.names.count("build_serialized_network")

    install(monkeypatch, FakeTensorRT())
    assert builds(FakeTensorRT()) == 1
    assert builds(FakeTensorRT()) == 0
    assert builds(FakeTensorRT(version="11.2.0")) == 1
    assert builds(FakeTensorRT(), sparse=False) == 1
    assert builds(FakeTensorRT(), model=onnx_of(torch.float16, torch.ones_like)) == 1  # other weights
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda: Gpu("Another", (8, 6), "13.0")))
    assert builds(FakeTensorRT()) == 1
    assert len(plans(cache)) == 5
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty", "no json"])
def test_a_damaged_plan_is_built_again(
    damage: str, model: OnnxModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, FakeTensorRT())
    opened(fake, model)
    (path,) = plans(cache)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    head = whole.split(b"\n", 1)[0]
    path.write_bytes({"cut": whole[:-5], "flipped": bytes(flipped), "foreign": b"x" * 200, "empty": b"",
                      "no json": head + b"\n[\nx"}[damage])  # fmt: skip
    opened(fake, model)
    assert fake.names.count("build_serialized_network") == 2
    assert path.read_bytes() == whole


def test_a_plan_that_does_not_deserialize_is_built_again_once(
    model: OnnxModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, FakeTensorRT(fail="deserialize once"))
    opened(fake, model)
    assert fake.names.count("build_serialized_network") == 2
    fake = FakeTensorRT(fail="deserialize")
    with pytest.raises(TargetError, match="expected an engine that it can read; got plan of another version"):
        opened(fake, model)
    assert fake.names.count("build_serialized_network") == 1
    assert plans(cache) == []


@pytest.mark.parametrize(
    ("fail", "says", "kept"),
    [
        ("parse", "a model that its ONNX parser takes; got error 0; error 1", 0),
        ("profile", "an optimization profile that fits the network", 0), ("build", "an engine; got out of memory", 0),
        ("context", "an execution context; got none: usually too little GPU memory", 1),
        ("shape", "a shape of input 'x' that the engine takes; got a refusal", 1),
        ("run", "a run that the engine takes", 1), ("dtype", "input 'x' of torch.uint8; got torch.float16", 1),
    ],
)  # fmt: skip
def test_every_step_that_fails_says_so(
    fail: str, says: str, kept: int, model: OnnxModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match=re.escape(says)) as caught:
        opened(install(monkeypatch, FakeTensorRT(fail=fail)), model)
    assert caught.value.do
    assert len(plans(cache)) == kept


def test_wrong_values_are_found_in_the_first_run_of_every_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeTensorRT(fail="values"))
    with pytest.raises(VerificationError, match="target 'tensorrt'"):
        half()
    fake.fail = ""
    fast = half()
    fake.fail = "values"
    for _ in range(2):  # an engine that was wrong once is not trusted the second time
        with pytest.raises(VerificationError, match="another batch size"):
            fast(torch.randn(5, 16).half())


def test_a_timing_cache_that_is_refused_is_started_anew(
    model: OnnxModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, FakeTensorRT(fail="timing"))
    opened(fake, model)
    opened(fake, model, sparse=False)
    caches = [call[1] for call in fake.calls if call[0] == "set_timing_cache"]
    assert caches == [b"", b"times", b""]


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, handle: int) -> None:
            self.cuda_stream, self.waited = handle, []

        def wait_stream(self, other: Any) -> None:
            self.waited.append(other.cuda_stream)

    first, second = Stream(1), Stream(2)
    order = iter([first, first, second])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(order))
    module = TensorRtModule.__new__(TensorRtModule)
    module.last_stream = None
    assert [module._stream(torch.device("cpu")) for _ in range(3)] == [1, 1, 2]
    assert (first.waited, second.waited) == ([], [1])


# --- without TensorRT or without a GPU


def test_without_tensorrt_the_error_offers_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    advice = r"\n  pip install 'fxsparse\[tensorrt\]'.*export_tensorrt\(.*engine=False\)"

    def refused(got: str) -> None:
        with pytest.raises(TargetError, match=got + advice):
            fxsparse.compile(Net(), target="tensorrt")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", cast(Any, None))
        refused(r"tensorrt 10\.12 or newer; got no such package\.")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "tensorrt", raising=False)
        patch.syspath_prepend(tmp_path)
        refused(r"got one that does not load: ImportError: libnvinfer.*")
    install(monkeypatch, FakeTensorRT(version="10.9.0"))
    refused(r"tensorrt 10\.12 or newer; got 10\.9\.0\.")
    install(monkeypatch, FakeTensorRT(version="10.12.0.36"))
    monkeypatch.setattr(target, "has_gpu", lambda: False)
    refused(r"an NVIDIA GPU that PyTorch sees; got none\.")


def test_a_model_on_the_cpu_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeTensorRT())
    monkeypatch.setattr(target, "DEVICE", "cuda")
    with pytest.raises(TargetError, match=r"a model and inputs on the current GPU; got cpu\.\n  Pass model\.cuda\(\)"):
        half()


@pytest.mark.parametrize("sparse", [True, False])
def test_the_file_comes_with_the_trtexec_line(sparse: bool, tmp_path: Path) -> None:
    model = Net().half().eval()
    masks = {"a.weight": two_four(model.a.weight)} if sparse else {}
    x = torch.randn(4, 16).half()
    compiled = fxsparse.compile(model, masks, "eager", formats="dense", example_inputs=x, measure=False)
    path = tmp_path / "a model.onnx"
    file = fxsparse.export_tensorrt(compiled, path, engine=False, batches=(1, 8, 64))
    assert path.exists()
    words = shlex.split(file.command)
    assert words == [
        "trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.plan')}", "--stronglyTyped",
        *["--sparsity=enable"] * sparse, "--minShapes=x:1x16", "--optShapes=x:8x16", "--maxShapes=x:64x16",
        f"--timingCacheFile={path.with_suffix('.timing')}", "--profilingVerbosity=detailed",
    ]  # fmt: skip
    assert str(file).endswith(file.command)
    assert file.onnx is not None
    assert file.onnx.two_four == (("a.weight",) if sparse else ())


def test_a_fixed_batch_has_no_shapes_in_the_line_and_wrong_batches_are_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 16)
    options: Any = {"example_inputs": x, "measure": False, "dynamic_batch": False}
    compiled = fxsparse.compile(Net().eval(), {}, "eager", **options)
    file = fxsparse.export_tensorrt(compiled, tmp_path / "m.onnx", engine=False)
    assert "Shapes" not in file.command
    for batches in ((0, 1, 2), (4, 2, 8), (1, 8, 4), (1, 8), ("a", "b", "c"), 8):
        with pytest.raises(InputError, match="smallest <= best <= largest"):
            fxsparse.export_tensorrt(compiled, tmp_path / "n.onnx", engine=False, batches=batches)  # type: ignore[arg-type]
    assert not (tmp_path / "n.onnx").exists()


def test_operators_outside_of_the_parser_s_table_are_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 16, dtype=torch.float64)
    compiled = fxsparse.compile(Net().double().eval(), {}, "eager", example_inputs=x, measure=False)
    with pytest.raises(TargetError, match=r"operators that its ONNX parser takes; got Gemm of DOUBLE, Relu of DOUBLE"):
        fxsparse.export_tensorrt(compiled, tmp_path / "m.onnx", engine=False)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_is_written_whole(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = install(monkeypatch, FakeTensorRT())
    file = fxsparse.export_tensorrt(half(), tmp_path / "m.plan", batches=(1, 8, 64))
    assert [p.read_bytes().startswith(b"fake plan") for p in file.files] == [True]
    assert ("set_shape", "x", (1, 16), (8, 16), (64, 16)) in fake.calls
    assert [d.where for d in file.decisions] == ["a.weight"]
    assert "2:4 sparse math" in str(file)


def test_the_fake_and_the_api_name_the_same_members() -> None:
    """Type checkers cannot see a fake that is put in at run time: compare the names at least."""
    fake = FakeTensorRT()
    wanted = {n for n in (*TensorRT.__annotations__, *vars(TensorRT)) if n[0].isupper() or n == "__version__"}
    assert all(hasattr(fake, name) for name in wanted)
    parts = {
        "IBuilder": fake.Builder(None), "IParser": fake.OnnxParser(None, None), "IRuntime": fake.Runtime(None),
        "BuilderConfig": fake.Builder(None).create_builder_config(),
    }  # fmt: skip
    for kind, part in parts.items():
        protocol = getattr(tensorrt_api, kind)
        assert all(hasattr(part, n) for n in vars(protocol) if not n.startswith("_")), kind


def test_the_page_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the engine."""
    page = (Path(__file__).parents[1] / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        if 'target="tensorrt"' not in block:
            exec(block, names)
    assert (tmp_path / "model.onnx").exists()
    assert names["file"].command.startswith("trtexec --onnx=model.onnx")
    assert "--sparsity=enable" in names["file"].command


# --- the real thing: never run by us yet


@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_real_engine_agrees_at_several_batch_sizes(dtype: torch.dtype, cache: Path) -> None:
    pytest.importorskip("tensorrt")
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
    model = model.cuda().to(dtype).eval()
    masks = {"0.weight": two_four(model[0].weight)}
    x = torch.randn(4, 32, 16, 16, device="cuda", dtype=dtype)
    fast = fxsparse.compile(model, masks, "tensorrt", example_inputs=(x,))
    dense = fxsparse.compile(model, masks, "eager", example_inputs=(x,), measure=False)
    for batch in (4, 1, 70):
        x = torch.randn(batch, 32, 16, 16, device="cuda", dtype=dtype)
        torch.testing.assert_close(fast(x), dense(x), rtol=2e-2, atol=2e-2)
    found = [d for d in fast.report.decisions if d.step == "tensorrt"]
    assert [d.where for d in found] == ["0.weight"]
    print(fast.report)


@pytest.mark.tensorrt
def test_a_real_engine_with_shuffled_blocks(cache: Path) -> None:
    pytest.importorskip("tensorrt")
    from tools.block_recipes import shuffled_blocks

    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 1))
    model = model.cuda().half().eval()
    masks = shuffled_blocks(model, sparsity=0.74, seed=0, rows=32)
    x = torch.randn(4, 3, 32, 32, device="cuda", dtype=torch.float16)
    fast = fxsparse.compile(model, masks, "tensorrt", example_inputs=(x,), formats="shuffled_block")
    assert any(r.stored == "shuffled_block" for r in fast.report.rows)
    print(fast.report)
