"""On a real GPU: packed layers, whole models, packages, torch.compile. `test_gpu.py` has what needs none."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxsparse
from fxsparse.formats.gpu import for_gpu
from fxsparse.formats.semi_structured_search import search
from fxsparse.formats.shuffled_block_few import few
from fxsparse.ir.graph import call_nodes, flat
from fxsparse.kernels.triton import shuffled_block_transposed
from tests.test_gpu import exact_of, packed_mlp, packed_model
from tests.test_shuffled_block import allowed, blocks
from tests.test_storage import integers
from tests.test_triton_shuffled_block import DTYPES

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
]  # fmt: skip


def half_of(model: nn.Module) -> dict[str, Tensor]:
    """Every second row of every convolution."""
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() == 4]
    return {n: (torch.arange(len(p)) % 2 == 0).view(-1, 1, 1, 1).expand(p.shape) for n, p in weights}


def normed() -> nn.Module:
    """Convolutions with batch norms, whose numbers are small integers, or nearly."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_layers_on_a_gpu(dtype: torch.dtype, target: str) -> None:
    fast, x = packed_mlp(dtype, "cuda", target)
    assert [r.stored for r in fast.report.rows] == ["shuffled_block"] * 2
    for tokens in (x, *(integers(n, 5, 64).to("cuda", dtype) for n in (7, 40))):
        own, exact = exact_of(packed_model().to("cuda", dtype), tokens)
        assert float((fast(tokens).double() - exact).abs().max()) <= allowed(own, exact)


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_of_few_tokens_on_a_gpu(dtype: torch.dtype, target: str) -> None:
    model = packed_model().to("cuda", dtype)
    x = integers(2, 1, 64).to("cuda", dtype)
    fast = fxsparse.compile(model, target=target, example_inputs=x, formats="shuffled_block", measure=False)
    assert len(list(call_nodes(for_gpu(flat(fast.graph_module)), few))) == 2
    for tokens in (x, *(integers(n, 1, 64).to("cuda", dtype) for n in (1, 7, 40))):
        own, exact = exact_of(packed_model().to("cuda", dtype), tokens)
        assert float((fast(tokens).double() - exact).abs().max()) <= allowed(own, exact)


@pytest.mark.parametrize("kind", ["shuffled_block", "n_m"])
def test_a_package_comes_back_on_a_gpu(tmp_path: Any, kind: str) -> None:
    model = nn.Linear(256, 128).eval()
    with torch.no_grad():
        model.weight.copy_(blocks((128, 256), 64, 0.3, 0))
        model.weight.view(-1, 4)[:, :2] = 0
    x = torch.randn(16, 256, device="cuda", dtype=torch.float16)
    options: dict[str, Any] = {"formats": kind, "measure": False, "target": "eager"}
    fast = fxsparse.compile(model.to("cuda", torch.float16), example_inputs=x, **options)
    fast.save(tmp_path / "m.fxsparse")
    torch.testing.assert_close(fxsparse.load(tmp_path / "m.fxsparse")(x), fast(x))


@pytest.mark.parametrize("kind", ["shuffled_block", "n_m"])
def test_formats_are_timed_on_a_gpu(kind: str) -> None:
    weight = blocks((2048, 2048), 128, 0.2, 0)
    if kind == "n_m":
        weight = torch.randn(2048, 2048)
        weight.view(-1, 4)[:, :2] = 0
    model = nn.Linear(2048, 2048).eval()
    with torch.no_grad():
        model.weight.copy_(weight)
    model.to("cuda", torch.bfloat16)
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    fast = fxsparse.compile(model, target="eager", example_inputs=x)
    timed = [d for d in fast.report.decisions if d.step == "choose_formats" and kind in d.what]
    assert timed[0].data["sparse_us"] > 0
    own, exact = exact_of(model, x)
    assert float((fast(x).double() - exact).abs().max()) <= allowed(own, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_compile_on_a_gpu(dtype: torch.dtype) -> None:
    model = normed().to("cuda", dtype)
    run: Any = torch.compile(model, backend="fxsparse", options={"masks": half_of(model)})
    exact = copy.deepcopy(model).double()
    fxsparse.Masks(half_of(model)).apply_(exact)
    with torch.no_grad():
        for batch in (2, 5):
            x = integers(batch, 3, 9, 9).to("cuda", dtype)
            torch.testing.assert_close(run(x).double(), exact(x.double()), rtol=1e-2, atol=1e-2)
        model[0].weight.mul_(2)
        exact[0].weight.mul_(2)
        torch.testing.assert_close(run(x).double(), exact(x.double()), rtol=1e-2, atol=1e-2)


def test_another_process_loads_a_package_on_a_gpu(tmp_path: Any) -> None:
    model = normed().cuda()
    x = integers(2, 3, 9, 9).cuda()
    fast = fxsparse.compile(model, half_of(model), example_inputs=x, measure=False)
    fast.save(tmp_path / "m.fxsparse")
    torch.save(x.cpu(), tmp_path / "x.pt")
    program = (
        "import torch, fxsparse; x = torch.load('x.pt').cuda();torch.save(fxsparse.load('m.fxsparse')(x).cpu(), 'y.pt')"
    )
    words = [sys.executable, "-W", "ignore", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(Path(fxsparse.__file__).parents[1])}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), fast(x).cpu(), rtol=1e-2, atol=1e-3)  # tf32


def test_resnet18_on_a_gpu_loses_channels_and_is_verified() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).cuda().half().eval()
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.float16)
    fast = fxsparse.compile(model, half_of(model), "auto", example_inputs=x)
    assert fast.report.verification is not None
    assert fast.report.macs_after < fast.report.macs_before
    exact = copy.deepcopy(model).double()
    fxsparse.Masks(half_of(model)).apply_(exact)
    for images in (x, torch.randn(7, 3, 64, 64, device="cuda", dtype=torch.float16)):
        with torch.no_grad():
            own, want = copy.deepcopy(exact).half()(images), exact(images.double())
        assert float((fast(images).double() - want).abs().max()) <= allowed(own, want)


@pytest.mark.parametrize(("shape", "searched"), [((4096, 1024, 6304), True), ((128, 256, 200), False)])
def test_a_search_that_dies_leaves_this_process_its_gpu(shape: tuple[int, int, int], searched: bool) -> None:
    found = search(*shape, torch.bfloat16, torch.device("cuda", 0))
    assert found > 0 or not searched
    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_offsets_into_x_beyond_31_bits() -> None:
    tokens, width = 32768, 66000
    rows, columns = torch.arange(16), torch.tensor([0, 40000, width - 1])
    arrays = [
        rows.int(), torch.tensor([0, 16]).int(), columns.int(), torch.tensor([0, 3]).int(),
        torch.ones(48, dtype=torch.bfloat16), torch.tensor([0, 48]),
    ]  # fmt: skip
    x = torch.zeros(width, tokens, dtype=torch.bfloat16, device="cuda")
    x[columns] = torch.tensor([[1.0], [2.0], [4.0]], dtype=x.dtype, device="cuda")
    assert x.numel() > 2**31
    y = shuffled_block_transposed(x, *(t.cuda() for t in arrays), out_features=16)
    assert bool((y == 7).all())
