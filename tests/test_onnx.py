"""Target "onnx", exported files, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxsparse
from fxsparse import contest
from fxsparse.deploy import onnx_model, standard
from fxsparse.deploy.onnx_runtime import OnnxSession
from fxsparse.errors import InputError, TargetError, VerificationError
from fxsparse.formats import shuffled_block_aten as expanded
from fxsparse.formats.shuffled_block_op import shuffled_block
from tests.test_storage import Of
from tools.block_recipes import shuffled_blocks
from tools.tables import load_rows


class Small(nn.Module):
    """Two convolutions with a sum and a batch norm, a strided one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 64, 1, stride=2)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (x + self.norm(self.b(self.a(x).relu()))).relu()
        return self.out(self.down(x).relu().mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers over [N, T, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def compiled(model: nn.Module, x: Any, masks: Any = None, **options: Any) -> fxsparse.SparseModule:
    masks = shuffled_blocks(model, sparsity=0.74, seed=0, rows=16) if masks is None else masks
    return fxsparse.compile(model.eval(), masks, "onnx", example_inputs=x, **{"measure": False, **options})


def test_it_runs_in_onnx_runtime_at_any_batch_size_and_reports_what_was_packed() -> None:
    model, masks = Small(), None
    fast = compiled(model, torch.randn(2, 3, 8, 8), verify="each")
    stored = {r.name: r.stored for r in fast.report.rows}
    assert stored["a.weight"] == stored["down.weight"] == "shuffled_block"
    assert stored["first.weight"] == "dense"
    masks = shuffled_blocks(model, sparsity=0.74, seed=0, rows=16)
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(fast(x), model(x))
    assert fast(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).shape == (2, 10)


def test_whole_models_compete_with_the_dense_onnx_runtime_build(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(Small(), torch.randn(2, 3, 8, 8), measure=True)
    names = {t.build for t in fast.report.timings}
    assert names == {"onnx, contiguous", "sparse: onnx", "sparse: onnx, dense weights"}
    stored = {r.stored for r in fast.report.rows}
    packed = any(n.target is shuffled_block for n in fast.graph_module.graph.nodes)
    if fast.report.chosen == "sparse":
        assert packed == ("shuffled_block" in stored)
    assert all(r.dense_us is None for r in fast.report.rows)  # times of PyTorch's kernels would say nothing here


def test_the_report_is_of_the_build_that_won(monkeypatch: pytest.MonkeyPatch) -> None:

    def rigged(slow: str) -> Any:
        real = contest.play_off

        def play_off(ours: Any, rivals: Any) -> Any:
            runs = real(ours, rivals, 0.1)
            return type(runs)({name: [1e3 if name == slow or name in rivals else 1.0 + i for i in range(6)]
                               for name in [*ours, *rivals]})  # fmt: skip

        return play_off

    for slow, packed in (("sparse: onnx", False), ("sparse: onnx, dense weights", True)):
        with monkeypatch.context() as patch:
            patch.setattr(contest, "play_off", rigged(slow))
            fast = compiled(Tokens(), torch.randn(2, 5, 64), measure=True)
        assert fast.report.chosen == "sparse"
        assert any(r.stored == "shuffled_block" for r in fast.report.rows) == packed
        timed = [d for d in fast.report.decisions if d.step == "choose_formats"]
        assert any(d.accepted for d in timed) == packed
        assert any("without formats was faster" in d.why for d in timed) != packed
        assert any(n.target is shuffled_block for n in fast.graph_module.graph.nodes) == packed


def test_inputs_and_outputs_keep_their_structure_and_constants() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: dict[str, Tensor], scale: float, nothing: None) -> Any:
            y = self.layer(x["a"]) * scale
            return {"y": y, "same": (y, x["b"]), "n": 3}

    inputs = ({"b": torch.randn(2, 4), "a": torch.randn(2, 8)}, 2.0, None)
    model = Nested()
    fast = fxsparse.compile(model, {}, "onnx", example_inputs=inputs, measure=False)
    theirs, ours = model(*inputs), fast(*inputs)
    assert ours["n"] == 3
    torch.testing.assert_close((ours["y"], ours["same"]), (theirs["y"], theirs["same"]))


def test_a_plan_for_onnx_counts_standard_operators() -> None:
    masks = {"a.weight": shuffled_blocks(Small(), sparsity=0.74, seed=0, rows=16)["a.weight"]}  # no row dies

    def why(target: str) -> str:
        report = fxsparse.plan(Small(), masks, torch.randn(1, 3, 8, 8), target=target)
        return next(d.why for d in report.decisions if (d.step, d.where) == ("choose_formats", "a.weight"))

    assert why("onnx").endswith("of the work, not timed")
    assert int(why("onnx").split("%")[0]) > 1.4 * int(why("eager").split("%")[0])  # taps are stacked


def test_float16_runs() -> None:
    fast = compiled(Small().half(), torch.randn(1, 3, 8, 8, dtype=torch.float16))
    assert any(r.stored == "shuffled_block" for r in fast.report.rows)  # no kernel of ours is needed
    assert fast(torch.randn(3, 3, 8, 8, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_runtime_has_no_kernels_for_is_refused_and_a_file_can_be_had(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    x, layer = torch.randn(1, 3, 8, 8, dtype=dtype), nn.Conv2d(3, 4, 3).eval().to(dtype)
    wanted = r"ONNX Runtime's CPU kernels compute; got .*\n  Use float32 or float16; .*verify"
    with pytest.raises(TargetError, match=wanted):
        compiled(layer, x, {})
    eager = fxsparse.compile(layer, {}, "eager", example_inputs=x, measure=False)
    file = fxsparse.export_onnx(eager, tmp_path / "m.onnx", verify=False)
    assert file.opset == (22 if dtype is torch.bfloat16 else 20)
    doubles = tuple(f"{name} of DOUBLE" for name in sorted(file.operators))
    assert file.not_in_tensorrt == (doubles if dtype is torch.float64 else ())


@pytest.fixture(scope="module")
def small() -> fxsparse.SparseModule:
    torch.manual_seed(0)
    return compiled(Small(), torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def model(small: fxsparse.SparseModule) -> onnx_model.OnnxModel:
    return onnx_model.to_onnx(small.graph_module)


# --- files


def test_a_file_is_standard_checked_dynamic_and_verified_at_several_batch_sizes(
    small: fxsparse.SparseModule, tmp_path: Path
) -> None:
    file = fxsparse.export_onnx(small, tmp_path / "new" / "small.onnx")
    proto = onnx.load(tmp_path / "new" / "small.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    assert not proto.functions
    assert proto.graph.input[0].name == "x"
    assert proto.graph.output[0].name == "output"
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    kinds = {n.op_type for n in proto.graph.node}
    assert {"Gather", "Conv"} <= kinds
    assert not kinds & {"BatchNormalization", "Transpose", "GatherND", "Einsum"}
    assert set(file.verified) == {1, 2, 5}
    assert file.not_in_tensorrt == ()
    assert dict(file.operators)["Conv"] == sum(n.op_type == "Conv" for n in proto.graph.node)
    assert "batch 5" in str(file)
    assert "2:4 sparse weights: none" in str(file)
    assert "unstructured" not in str(file)
    text = proto.SerializeToString()
    assert str(Path(fxsparse.__file__).parent).encode() not in text
    assert str(Path(torchvision.__file__).parents[1]).encode() not in text


def test_unstructured_weights_are_written_dense_and_that_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 4, 32), nn.Linear(32, 10)).eval()
    masks = {
        name: torch.rand(w.shape) < 0.1 for name, w in model.named_parameters() if name in ("0.weight", "2.weight")
    }
    x = torch.randn(2, 16, 4, 4)
    fast = fxsparse.compile(model, masks, "eager", example_inputs=x, formats="unstructured", measure=False)
    file = fxsparse.export_onnx(fast, tmp_path / "model.onnx", verify=False)
    assert file.unstructured == sum(row.stored == "unstructured" for row in fast.report.rows) == 2
    assert "\n2 unstructured weights are written dense (zeros stored)" in str(file)
    written = {tuple(t.dims) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {(32, 16, 3, 3), (32, 128)} <= written


def test_linear_layers_over_tokens_become_batched_products(tmp_path: Path) -> None:
    fast = compiled(Tokens(), torch.randn(2, 5, 64))
    file = fxsparse.export_onnx(fast, tmp_path / "m.onnx")
    assert {r.name: r.stored for r in fast.report.rows} == {"up.weight": "shuffled_block", "down.weight": "dense"}
    assert file.operators["MatMul"] == 2
    assert file.operators["Gather"] == 1


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        fxsparse.export_onnx(compiled(Tokens(), torch.randn(2, 5, 64)), tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_weights_in_a_second_file(model: onnx_model.OnnxModel, tmp_path: Path) -> None:
    files = onnx_model.save(model, tmp_path / "m.onnx", external_data=True)
    assert [p.name for p in files] == ["m.onnx", "m.onnx.data"]
    assert sorted(tmp_path.iterdir()) == list(files)
    assert files[1].stat().st_size > 0
    (single,) = onnx_model.save(model, tmp_path / "s.onnx")
    two, one = onnx.load(files[0]), onnx.load(single)
    assert two.graph.node == one.graph.node
    ours = {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in two.graph.initializer}
    assert ours == {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in one.graph.initializer}


def test_a_fixed_batch(tmp_path: Path) -> None:
    fast = compiled(nn.Linear(4, 4), torch.randn(3, 4), {}, dynamic_batch=False)
    file = fxsparse.export_onnx(fast, tmp_path / "m.onnx")
    assert set(file.verified) == {3}
    assert onnx.load(file.files[0]).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_a_write_that_fails_leaves_the_old_file(
    model: onnx_model.OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(proto: Any, name: Path, **options: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    for external in (False, True):
        with pytest.raises(OSError, match="No space"):
            onnx_model.save(model, path, external_data=external)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_a_file_that_computes_something_else_is_not_written(
    small: fxsparse.SparseModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expanded._Builder, "bias_of", lambda self, bucket, size: None)
    with pytest.raises(VerificationError, match="ONNX file at batch 2"):
        fxsparse.export_onnx(small, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    assert fxsparse.export_onnx(small, tmp_path / "m.onnx", verify=False).verified == {}


def two_four(weight: Tensor) -> Tensor:
    """The two largest of four consecutive inputs."""
    parts = weight.movedim(1, -1).unflatten(-1, (-1, 4))
    kept = parts.abs().argsort(-1).argsort(-1) >= 2
    return kept.flatten(-2).movedim(-1, 1)


def test_two_four_weights_are_found_and_their_linear_layers_become_gemm(tmp_path: Path) -> None:
    class Model(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.conv(x.unflatten(-1, (8, 8)).transpose(1, 2)).mean()

    model = Model()
    masks = {n: two_four(model.get_parameter(n)) for n in ("up.weight", "conv.weight")}
    fast = compiled(model, torch.randn(2, 5, 64), masks, formats="dense")
    file = fxsparse.export_onnx(fast, tmp_path / "m.onnx")
    assert set(file.two_four) == {"up.weight", "conv.weight"}
    assert file.operators["Gemm"] == 1
    assert file.operators["MatMul"] == 1
    pytest.importorskip("polygraphy")  # another's check of the pattern, where it is installed
    command = [
        sys.executable,
        "-c",
        "from polygraphy.tools import main; main()",
        "inspect",
        "sparsity",
        str(tmp_path / "m.onnx"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert set(re.findall(r"Found sparse tensor: (\S+)", said.stdout)) == {"up.weight", "conv.weight"}


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4]]), True), (torch.tensor([[1.0, 0, 2, 3]]), False),
        (torch.tensor([[1.0, 0, 2, 0, 0]]), False), (torch.zeros(2, 4), False), (torch.ones(3), False),
        (torch.tensor([[0.0, 1, 1, 1], [0, 0, 0, 0]]), False),
    ],
)  # fmt: skip
def test_two_four_is_two_of_four_consecutive_inputs(weight: Tensor, found: bool) -> None:
    assert standard.is_two_four(weight) == found


def test_what_tensorrt_does_not_take_is_named() -> None:
    def found(kind: str, dtype: int) -> tuple[str, ...]:
        value = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node(kind, ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [value("x", dtype, [1])], [value("y", dtype, [1])])
        return onnx_model.not_in_tensorrt(onnx.helper.make_model(graph))

    assert found("Relu", onnx.TensorProto.FLOAT16) == ()
    assert found("Relu", onnx.TensorProto.DOUBLE) == ("Relu of DOUBLE",)
    assert found("Bernoulli", onnx.TensorProto.FLOAT) == ("Bernoulli",)
    assert "Unique" not in onnx_model.tensorrt_operators()


def test_foreign_operators_are_no_standard_model() -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")
    graph = onnx.helper.make_graph([node], "g", [value], [onnx.helper.make_tensor_value_info("y", 1, [1])])
    with pytest.raises(TargetError, match=r"got com\.microsoft::FusedConv"):
        onnx_model.check_proto(
            onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("com.microsoft", 1)])
        )


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_packages_the_error_names_the_extra(
    small: fxsparse.SparseModule, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    advice = rf"got no {missing}\.\n  pip install 'fxsparse\[onnx\]'"
    with pytest.raises(TargetError, match=advice):
        fxsparse.compile(Small(), target="onnx")
    with pytest.raises(TargetError, match=advice):
        fxsparse.export_onnx(small, "never.onnx")


def test_an_operator_that_onnx_lacks_is_named() -> None:
    class Digamma(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j1(x)

    with pytest.raises(TargetError, match=r"ONNX model: .*bessel_j1"):
        fxsparse.compile(Digamma(), {}, "onnx", example_inputs=(torch.randn(2, 3),), measure=False)


def test_only_compiled_models_and_writable_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"what fxsparse\.compile returned; got Small"):
        fxsparse.export_onnx(Small(), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="never called"):
        fxsparse.export_onnx(fxsparse.compile(Small().eval(), target="eager"), tmp_path / "m.onnx")
    fast = fxsparse.compile(Small().eval(), {}, "eager", example_inputs=(torch.randn(1, 3, 8, 8),), measure=False)
    with pytest.raises(InputError, match="got a folder"):
        fxsparse.export_onnx(fast, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="got FileExistsError"):
        fxsparse.export_onnx(fast, tmp_path / "file" / "m.onnx")


def test_sessions_are_shared_by_copies_and_batch_sizes(small: fxsparse.SparseModule) -> None:

    small(torch.randn(5, 3, 8, 8))
    build = small._built("test")
    assert isinstance(build.run, OnnxSession)
    assert build.any_batch is build.run
    assert copy.deepcopy(build.run) is build.run


def test_a_torchvision_model_exports_and_agrees(tmp_path: Path) -> None:
    """One of them; `python -m tools.onnx_models` does all."""
    model = torchvision.models.resnet18(weights=None).eval()
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() == 4]
    masks = {n: (torch.rand(len(p)) < 0.7).view(-1, 1, 1, 1).expand_as(p) for n, p in weights}
    fast = fxsparse.compile(model, masks, "eager", example_inputs=torch.randn(1, 3, 32, 32), measure=False)
    file = fxsparse.export_onnx(fast, tmp_path / "m.onnx")
    assert file.not_in_tensorrt == ()
    assert set(file.verified) == {1, 2, 5}
    assert sum(f.stat().st_size for f in file.files) < 3 * sum(p.numel() for p in model.parameters())


def test_the_page_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    assert (tmp_path / "model.onnx").exists()
    assert {t.build for t in names["fast"].report.timings} == {
        "onnx, contiguous",
        "sparse: onnx",
        "sparse: onnx, dense weights",
    }


def test_complex_results_are_refused() -> None:
    """The exporter would write pairs of real numbers."""
    model = Of(lambda m, x: torch.view_as_complex(m["a"](x).view(-1, 2, 2)), a=nn.Linear(3, 4)).eval()
    with pytest.raises(TargetError, match=r"expected real inputs and outputs; got .*complex64"):
        compiled(model, torch.randn(2, 3), {})


def test_an_index_beyond_its_table_is_an_input_error() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)).eval()
    fast = compiled(model, torch.tensor([[1, 2], [3, 4]]), {})
    with pytest.raises(InputError, match="expected values that every operator takes"):
        fast(torch.tensor([[1, 2], [3, 99]]))


def test_the_page_counts_the_committed_rows() -> None:
    root = Path(__file__).parents[1]
    rows = [row for row in load_rows("onnx") if row["dtype"] == "float32"]
    assert not any("allowed 0.0" in said for row in rows for said in row["verified"].values())  # outputs of zeros
    assert all(set(row["verified"]) == {"1", "2", "5"} and not row["not_in_tensorrt"] for row in rows)
    page = (root / "docs" / "onnx.md").read_text(encoding="utf-8")
    assert f"It has run on all {len(rows)}," in " ".join(page.split())  # wherever its lines are broken
