"""Running a TensorRT engine on PyTorch's tensors and its current CUDA stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse.deploy.onnx_model import OnnxModel
from fxsparse.deploy.standard import filled
from fxsparse.deploy.tensorrt_api import CudaEngine, TensorRT
from fxsparse.deploy.tensorrt_build import Gpu, Plan, Profile, build, decisions, logger
from fxsparse.errors import TargetError

_DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64, "INT32": torch.int32,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# outputs of one run and the inputs they came from: raises when they are wrong
Check = Callable[[Sequence[Any], Sequence[Any]], None]


class TensorRtModule:
    """Flattened inputs -> flattened outputs, on CUDA tensors, asynchronously on the current stream.

    profile    batch sizes of the first engine; a larger batch builds another that reaches it, once
    check      called with the inputs and outputs of each engine's first run; None: no check
    decisions  what became of every 2:4 weight
    """

    def __init__(
        self, trt: TensorRT, model: OnnxModel, profile: Profile, *, sparse: bool, check: Check | None = None
    ) -> None:
        self.trt, self.model, self.sparse, self.check = trt, model, sparse, check
        self.last_stream: Any = None
        self.lock = threading.Lock()  # an execution context serves one call at a time
        self._open(profile)

    def _open(self, profile: Profile) -> None:
        if self.last_stream is not None:
            self.last_stream.synchronize()  # the context that goes away may still be at work
        self.profile, self.unchecked = profile, True
        self.plan, self.engine = open_engine(self.trt, self.model, profile, sparse=self.sparse)
        context = self.engine.create_execution_context()
        if context is None:
            raise _refused("an execution context", "none: usually too little GPU memory")
        self.context = context
        self.decisions = decisions(self.model, self.plan)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """All flattened inputs of the graph in; its flattened outputs, in memory of their own."""
        with self.lock:
            batch = _batch(self.model, inputs)
            if batch is not None and batch > self.profile.most:
                self._open(Profile(1, batch, 1 << (batch - 1).bit_length()))
            outputs = filled(self.model.graph.outputs, self._run(inputs))
            if self.unchecked and self.check is not None:
                self.check(inputs, outputs)
            self.unchecked = False
        return outputs

    def _run(self, inputs: Sequence[Any]) -> list[Tensor]:
        names = [value.name for value in self.model.proto.graph.input]
        given = {name: inputs[i].contiguous() for name, i in zip(names, self.model.graph.inputs, strict=True)}
        engine = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {name: self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT for name in engine}
        for name in filter(is_input.__getitem__, engine):
            _check_dtype(name, given[name], _dtype(self.engine, name))
            _accepted(self.context.set_input_shape(name, tuple(given[name].shape)), f"shape of input {name!r}")
            _accepted(self.context.set_tensor_address(name, given[name].data_ptr()), f"address of input {name!r}")
        device = next(iter(given.values())).device
        found = {}
        for name in [n for n in engine if not is_input[n]]:
            shape = tuple(self.context.get_tensor_shape(name))
            found[name] = torch.empty(shape, dtype=_dtype(self.engine, name), device=device)
            _accepted(self.context.set_tensor_address(name, found[name].data_ptr()), f"address of output {name!r}")
        _accepted(self.context.execute_async_v3(self._stream(device)), "run")
        return [found[value.name] for value in self.model.proto.graph.output]

    def _stream(self, device: torch.device) -> int:
        """The current stream; when it is another than last time, it waits for that: they share the context."""
        stream = torch.cuda.current_stream(device)
        if self.last_stream is not None and stream != self.last_stream:
            stream.wait_stream(self.last_stream)
        self.last_stream = stream
        return int(stream.cuda_stream)

    def __deepcopy__(self, memo: object) -> TensorRtModule:
        """Itself: calls take turns, and nothing else changes it."""
        return self


def open_engine(trt: TensorRT, model: OnnxModel, profile: Profile, *, sparse: bool) -> tuple[Plan, CudaEngine]:
    """Plan and engine. A plan from the cache that this TensorRT does not take is built again, once."""
    said: list[tuple[str, str]] = []
    runtime, gpu = trt.Runtime(logger(trt, said)), Gpu.current()
    for _ in range(2):
        plan = build(trt, model, profile, gpu=gpu, sparse=sparse)
        engine = runtime.deserialize_cuda_engine(plan.data)
        if engine is not None:
            return plan, engine
        plan.path.unlink(missing_ok=True)
    raise _refused("an engine that it can read", "; ".join(text for kind, text in said if "ERROR" in kind) or "none")


def _batch(model: OnnxModel, inputs: Sequence[Any]) -> int | None:
    """Size of the free dimension; None where all are fixed."""
    for value, i in zip(model.proto.graph.input, model.graph.inputs, strict=True):
        for d, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                return int(inputs[i].shape[d])
    return None


def _dtype(engine: CudaEngine, name: str) -> torch.dtype:
    kind = str(getattr(engine.get_tensor_dtype(name), "name", engine.get_tensor_dtype(name)))
    if kind not in _DTYPES:
        raise _refused(f"tensor {name!r} of a dtype that PyTorch has", kind)
    return _DTYPES[kind]


def _check_dtype(name: str, given: Tensor, wanted: torch.dtype) -> None:
    if given.dtype != wanted:
        raise _refused(f"input {name!r} of {wanted}", str(given.dtype))


def _accepted(done: bool, what: str) -> None:
    """TensorRT's calls return False, and tell the reason to the log."""
    if not done:
        raise _refused(f"a {what} that the engine takes", "a refusal; its reason is in the log of 'fxsparse'")


def _refused(expected: str, got: str) -> TargetError:
    return TargetError("target 'tensorrt'", expected=expected, got=got,
                       do="Compile again for these inputs; if that fails too, please report it.")  # fmt: skip
