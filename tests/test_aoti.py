"""save_aoti: a library that runs without the model, in Python and in C++."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor
from torch import Tensor

import fxsparse
from fxsparse import InputError, TargetError
from fxsparse.backend.target import COMPILING
from fxsparse.kernels.build import compiler
from tests.test_compile import Net, masks_of
from tests.test_package import compiled, more, packed
from tests.test_storage import Of, conv, integers

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tools" / "aoti_example"
IN_A_NEW_PROCESS = """
import sys, torch, torch._inductor
try:
    torch._inductor.aoti_load_package(sys.argv[1])
except RuntimeError as error:
    assert "fxsparse::shuffled_block" in str(error)
import fxsparse
run = torch._inductor.aoti_load_package(sys.argv[1])
for x, y in torch.load(sys.argv[2]):
    torch.testing.assert_close(run(*x), y, rtol=0, atol=0)
print("equal", run.get_metadata()["inputs"])
"""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_one_library_takes_any_batch_size_and_the_user_s_own_structure_in_a_new_process(tmp_path: Path) -> None:
    def forward(m: Any, x: dict[str, Tensor], rest: list[Any]) -> Any:
        return {"y": [m["b"](m["a"](x["a"]).relu()) * rest[1]], "z": rest[0] + 1}

    model = Of(forward, a=conv(3, 8), b=conv(8, 32))
    inputs = ({"a": integers(1, 3, 8, 8)}, [integers(1, 4), 3])  # whole numbers: exact in any order of summing
    module = compiled(model, *inputs, formats="shuffled_block")
    assert "shuffled_block" in module.graph_module.code
    module.save_aoti(tmp_path / "m.pt2", dynamic_batch=True)
    batches = [inputs, more(inputs), more(more(inputs))]
    torch.save([(x, module(*x)) for x in batches], tmp_path / "expected")
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path / "m.pt2"), str(tmp_path / "expected")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.startswith("equal torch.float32 (1, 3, 8, 8) on cpu; "), run.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "m.pt2"]


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    module = compiled(Net(), torch.randn(1, 2, 8, 8))
    with pytest.raises(InputError, match="expected a name that ends in"):
        module.save_aoti(tmp_path / "m.so")
    with pytest.raises(InputError, match="expected a path that can be written"):
        module.save_aoti("/proc/m.pt2")


def test_a_graph_for_one_batch_size_gives_no_library_for_any(tmp_path: Path) -> None:
    model = Of(lambda m, x: m["a"](x).view(2, 8, 64), a=conv(3, 8))
    fixed = compiled(model, torch.randn(2, 3, 8, 8), dynamic_batch=False)
    with pytest.raises(TargetError, match=r"AOTInductor package: expected .*; got UserError: "):
        fixed.save_aoti(tmp_path / "m.pt2", dynamic_batch=True)
    assert not list(tmp_path.iterdir())


def test_whatever_exports_a_graph_does_so_in_one_thread_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export: Any = torch.export.export
    held: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        held.append(COMPILING._is_owned())  # type: ignore[attr-defined]
        return export(*args, **kwargs)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("enough is known")

    monkeypatch.setattr("torch.export.export", spy)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    x = torch.randn(2, 2, 8, 8)
    fxsparse.plan(Net(), None, (x,))
    module = compiled(Net(), x, target="inductor")
    module.save(tmp_path / "m", native=True)
    with pytest.raises(TargetError, match="enough is known"):
        module.save_aoti(tmp_path / "m.pt2")
    assert held == [True] * 4
    pytest.importorskip("onnxscript")
    fxsparse.export_onnx(module, tmp_path / "m.onnx", verify=False)
    assert len(held) > 4
    assert all(held)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_the_cpp_example_computes_what_python_does(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    module = packed(x)
    assert "shuffled_block" in module.graph_module.code
    module.save_aoti(tmp_path / "m.pt2")
    x.numpy().tofile(tmp_path / "input.bin")
    quick = {**os.environ, "CXX": f"{compiler()} -DFXSPARSE_FEW_TILES"}
    subprocess.run([str(EXAMPLE / "build.sh"), str(tmp_path / "example"), sys.executable], check=True, env=quick)

    def run(model: str, data: str) -> subprocess.CompletedProcess[str]:
        command = ["./example", model, data, "output.bin", "2,3,8,8"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)

    environment = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    assert run("m.pt2", "input.bin").stdout == "compiled for torch.float32 (2, 3, 8, 8) on cpu\n"
    y = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))(x)
    assert torch.equal(torch.from_numpy(np.fromfile(tmp_path / "output.bin", np.float32)).view(y.shape), y)
    assert "shorter than 1536 bytes" in run("m.pt2", "m.pt2x").stderr
    assert run("gone.pt2", "input.bin").returncode == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_library_and_native_code_run_on_a_gpu(tmp_path: Path) -> None:
    x = torch.randn(2, 2, 8, 8, device="cuda")
    module = compiled(Net().cuda(), x, masks=masks_of(Net()), target="inductor")
    module.save_aoti(tmp_path / "m.pt2", dynamic_batch=True)
    run = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    torch.testing.assert_close(run(x), module(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(more(x)), module(more(x)), rtol=1e-3, atol=1e-4)
    module.save(tmp_path / "m", native=True)
    for native in (False, True):
        torch.testing.assert_close(fxsparse.load(tmp_path / "m", native=native)(x), module(x), rtol=1e-3, atol=1e-4)
