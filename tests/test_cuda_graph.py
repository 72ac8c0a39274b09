"""CUDA graphs: what is called in which order, on a recording fake of torch.cuda, and, marked `gpu`, the real thing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.backend import cuda_graph
from fxsparse.backend.cuda_graph import WARM_UPS, CudaGraph, captured
from fxsparse.formats.semi_structured import SEARCHING

CPU = torch.device("cpu")


class FakeCuda:
    """Stands for the module `torch.cuda`: it records calls, and replays on the CPU. No CUDA is in it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.capturing = False
        self.buffer = torch.empty(2, 3)
        self.held: Tensor | None = None

    def run(self, x: Tensor, factor: float) -> tuple[Tensor, None]:
        """Writes to memory of its own, as kernels in a graph do."""
        self.calls.append("run")
        self.held = x
        return torch.mul(x, factor, out=self.buffer), None

    @contextlib.contextmanager
    def _within(self, name: str) -> Iterator[None]:
        self.calls.append(f"{name} {{")
        yield
        self.calls.append("}")

    def device(self, device: torch.device) -> Any:
        return contextlib.nullcontext()

    def Stream(self) -> Any:
        return _Stream(self, "side")

    def current_stream(self) -> Any:
        return _Stream(self, "current")

    def stream(self, stream: _Stream) -> Any:
        return self._within(stream.name)

    def graph(self, graph: _Graph, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        return self._within("capture")

    def CUDAGraph(self) -> Any:
        return _Graph(self)

    def Event(self) -> Any:
        return _Event(self)

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


class _Part:
    def __init__(self, cuda: FakeCuda, name: str = "") -> None:
        self.cuda, self.name = cuda, name


class _Stream(_Part):
    def wait_stream(self, other: _Stream) -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")


class _Event(_Part):
    def record(self) -> None:
        self.cuda.calls.append("record")

    def wait(self) -> None:
        self.cuda.calls.append("wait")


class _Graph(_Part):
    def replay(self) -> None:
        assert self.cuda.held is not None
        torch.mul(self.cuda.held, 2.0, out=self.cuda.buffer)
        self.cuda.calls.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_the_run_is_warmed_up_on_another_stream_and_then_captured(cuda: FakeCuda) -> None:
    CudaGraph(cuda.run, [torch.ones(2, 3), 2.0], CPU)
    assert cuda.calls == [
        "side waits for current", "side {", *["run"] * WARM_UPS, "}", "current waits for side",
        "capture {", "run", "}", "record",
    ]  # fmt: skip


def test_libraries_time_their_algorithms_while_it_is_made(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen = []

    def run(x: Tensor) -> tuple[Tensor]:
        seen.append(torch.backends.cudnn.benchmark and SEARCHING.get())
        return (x + 1,)

    CudaGraph(run, [torch.ones(2)], CPU)
    assert seen == [True] * (WARM_UPS + 1)
    assert not torch.backends.cudnn.benchmark
    assert not SEARCHING.get()


def test_results_and_inputs_of_a_call_are_not_touched_by_the_next(cuda: FakeCuda) -> None:
    x, z = torch.randn(2, 3), torch.randn(2, 3)
    kept = x.clone()
    graph = CudaGraph(cuda.run, [x, 2.0], CPU)
    cuda.calls.clear()
    (y, none), (w, _) = graph(x, 2.0), graph(z, 2.0)
    assert torch.equal(y, 2 * kept)
    assert torch.equal(w, 2 * z)
    assert torch.equal(x, kept)
    assert none is None
    assert cuda.calls == ["wait", "replay", "record"] * 2


def test_a_graph_of_the_user_s_holds_the_kernels_themselves(cuda: FakeCuda) -> None:
    graph = CudaGraph(cuda.run, [torch.ones(2, 3), 2.0], CPU)
    cuda.calls.clear()
    cuda.capturing = True
    graph(torch.ones(2, 3), 2.0)
    assert cuda.calls == ["run"]


def test_what_is_not_on_a_gpu_runs_as_it_is() -> None:
    assert captured(len, [torch.ones(1)]) is len
    assert captured(len, [1.0]) is len


def test_what_torch_cannot_capture_runs_as_it_is_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(cuda_graph, "CudaGraph", refuses)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
    with caplog.at_level(logging.WARNING, "fxsparse"):
        assert captured(len, [x]) is len
    assert caplog.messages == [
        "no CUDA graph, kernels are launched one by one: operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("target", ["inductor", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compile_on_a_gpu(target: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3)).cuda().to(dtype).eval()
    masks = {"0.weight": (torch.arange(32) % 2 == 0).view(-1, 1, 1, 1).expand(32, 8, 3, 3)}
    x = torch.randn(2, 8, 17, 15, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    fast = fxsparse.compile(model, masks, target, example_inputs=(x,))
    with torch.no_grad():
        model[0].weight.mul_(masks["0.weight"].cuda())
        first, want = fast(x), model(x)
        kept = first.clone()
        for other in (torch.randn_like(x), torch.randn(5, 8, 17, 15, device="cuda", dtype=dtype)):
            torch.testing.assert_close(fast(other), model(other), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(first, want, rtol=2e-2, atol=2e-2)
    assert torch.equal(first, kept)
