"""A run on a GPU as one CUDA graph: a hundred kernels are launched at once, which is most of the time at batch 1.

Inductor's own graphs (mode="reduce-overhead") are not used: their results lie in memory that the next call overwrites,
and they can be called only in threads that torch started. Source: "CUDA Graphs" in torch's notes on CUDA semantics.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse.backend.target import COMPILING, Runnable
from fxsparse.formats.semi_structured import SEARCHING
from fxsparse.ir.inputs import device_of

log = logging.getLogger("fxsparse")
WARM_UPS = 3  # libraries choose algorithms and get their workspaces in the first calls; torch's notes ask for three


class CudaGraph:
    """`run` for inputs of these shapes, strides and dtypes. Results are new tensors; any thread and stream may call.

    Calls wait for each other, since all of them use the graph's memory. RuntimeError when `run` cannot be captured.
    """

    def __init__(self, run: Runnable, inputs: Sequence[Any], device: torch.device) -> None:
        self._run, self._device, self._lock = run, device, threading.Lock()
        self._inputs = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        with torch.no_grad(), torch.cuda.device(device), _libraries_try():
            self._warm_up()
            self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
            # Another thread may allocate meanwhile; only what this one does belongs to the graph.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = list(run(*self._inputs))
            self._done.record()

    def _warm_up(self) -> None:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run(*self._inputs)
        current.wait_stream(side)

    def __call__(self, *inputs: Any) -> list[Any]:
        with self._lock, torch.no_grad(), torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():  # into a graph of the user's, which cannot hold this one
                return list(self._run(*inputs))
            self._done.wait()  # the last call, perhaps on another stream, has read its inputs and results
            for own, x in zip(self._inputs, inputs, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(x)
            self._graph.replay()
            results = [y.clone() if isinstance(y, Tensor) else y for y in self._outputs]
            self._done.record()
        return results


@contextlib.contextmanager
def _libraries_try() -> Iterator[None]:
    """Inside, cuDNN and cuSPARSELt time their algorithms for every new layer: the graph keeps the fastest for good."""
    searching = SEARCHING.set(True)
    with COMPILING:  # cuDNN's switch is the process's
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before
            SEARCHING.reset(searching)


def captured(run: Runnable, inputs: Sequence[Any]) -> Runnable:
    """`run` as a CUDA graph when its inputs are on a GPU; itself elsewhere and, with a warning, where torch refuses."""
    device = device_of(inputs)
    if device.type != "cuda":
        return run
    try:
        return CudaGraph(run, inputs, device)
    except RuntimeError as error:
        log.warning("no CUDA graph, kernels are launched one by one: %s", str(error).splitlines()[0])
        return run
