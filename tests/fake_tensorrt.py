"""A fake of the module `tensorrt`: it records every call, and runs models in ONNX Runtime. No TensorRT is in it."""

from __future__ import annotations

import ctypes
import enum
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

PLAN = b"fake plan\n"
DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class FakeTensorRT:
    """`fail` names the step that fails; `said` is what the builder logs."""

    def __init__(self, version: str = "11.1.0", fail: str = "", said: tuple[str, ...] = ()) -> None:
        self.__version__, self.fail, self.said = version, fail, said
        self.__spec__ = object()  # as a module has one
        self.calls: list[tuple[Any, ...]] = []
        self.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 3})
        self.BuilderFlag = enum.Enum("BuilderFlag", "SPARSE_WEIGHTS")
        self.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
        self.TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
        self.DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT32 INT64 BOOL INT8 UINT8")
        self.Severity = enum.Enum("Severity", "ERROR INFO")
        self.ILogger = type("ILogger", (), {})

    def record(self, *call: Any) -> None:
        self.calls.append(call)

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def Builder(self, logger: Any) -> Any:
        return _Builder(self, logger)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return _Parser(self, network)

    def Runtime(self, logger: Any) -> Any:
        return _Runtime(self, logger)


class _Part:
    def __init__(self, trt: FakeTensorRT, logger: Any = None) -> None:
        self.trt, self.logger = trt, logger


class _Builder(_Part):
    def create_network(self, flags: int) -> Any:
        self.trt.record("create_network", flags)
        return _Network()

    def create_builder_config(self) -> Any:
        return _Config(self.trt)

    def create_optimization_profile(self) -> Any:
        return _Profile(self.trt)

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        self.trt.record("build_serialized_network", config.profiling_verbosity)
        for line in self.trt.said:
            self.logger.log(self.trt.Severity.INFO, line)
        if self.trt.fail == "build":
            self.logger.log(self.trt.Severity.ERROR, "out of memory")
            return None
        return PLAN + network.model


class _Network:
    model = b""


class _Config(_Part):
    profiling_verbosity: Any = None

    def set_flag(self, flag: Any) -> None:
        self.trt.record("set_flag", flag.name)

    def add_optimization_profile(self, profile: Any) -> int:
        self.trt.record("add_optimization_profile")
        return -1 if self.trt.fail == "profile" else 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return _Timing(serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.trt.record("set_timing_cache", cache.data, ignore_mismatch)
        return not (self.trt.fail == "timing" and cache.data)

    def get_timing_cache(self) -> Any:
        return _Timing(b"times")


class _Timing:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class _Profile(_Part):
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.trt.record("set_shape", input, tuple(min), tuple(opt), tuple(max))


class _Error:
    def __init__(self, text: str) -> None:
        self.text = text

    def desc(self) -> str:
        return self.text


class _Parser(_Part):
    num_errors = 2

    def __init__(self, trt: FakeTensorRT, network: Any) -> None:
        super().__init__(trt)
        self.network = network

    def parse_from_file(self, model: str) -> bool:
        self.trt.record("parse_from_file")
        onnx.checker.check_model(model)
        self.network.model = onnx.load(model).SerializeToString()
        return self.trt.fail != "parse"

    def get_error(self, index: int) -> _Error:
        return _Error(f"error {index}")


class _Runtime(_Part):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        self.trt.record("deserialize_cuda_engine")
        count = self.trt.names.count("deserialize_cuda_engine")
        if self.trt.fail == "deserialize" or (self.trt.fail == "deserialize once" and count == 1):
            self.logger.log(self.trt.Severity.ERROR, "plan of another version")
            return None
        assert serialized_engine.startswith(PLAN)
        return _Engine(self.trt, serialized_engine.removeprefix(PLAN))


class _Engine(_Part):
    def __init__(self, trt: FakeTensorRT, model: bytes) -> None:
        super().__init__(trt)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        graph = onnx.load_from_string(model).graph
        kinds = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "INT64": "INT64"}
        self.inputs, self.outputs = [v.name for v in graph.input], [v.name for v in graph.output]
        self.dtypes = {
            v.name: kinds[onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type)]
            for v in [*graph.input, *graph.output]
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self.dtypes)

    def get_tensor_name(self, index: int) -> str:
        return [*self.outputs, *self.inputs][index]  # in an order of its own

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType.UINT8 if self.trt.fail == "dtype" else self.trt.DataType[self.dtypes[name]]

    def create_execution_context(self) -> Any:
        return None if self.trt.fail == "context" else _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.trt.record("set_input_shape", name, shape)
        self.shapes[name] = shape
        return self.trt.fail != "shape"

    def _run(self, feed: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, feed), strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {n: np.zeros(s, DTYPES[self.engine.dtypes[n]]) for n, s in self.shapes.items()}
        return tuple(self._run(zeros)[name].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.trt.record("execute_async_v3", stream_handle)
        if self.trt.fail == "run":
            return False
        feed = {}
        for name, shape in self.shapes.items():
            dtype = DTYPES[self.engine.dtypes[name]]
            raw = ctypes.string_at(self.addresses[name], math.prod(shape) * np.dtype(dtype).itemsize)
            feed[name] = np.frombuffer(raw, dtype).reshape(shape)
        for name, value in self._run(feed).items():
            value = value * 2 if self.trt.fail == "values" else value
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True


def plans(folder: Path) -> list[Path]:
    return sorted(folder.glob("tensorrt-*.plan"))
