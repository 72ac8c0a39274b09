"""What is used of TensorRT's Python API, as protocols: the only names that the code beside this file may touch.

They are the same in TensorRT 10.12 to 11.4. Source: python/src of NVIDIA/TensorRT, release/11.1, and its documentation
(Apache-2.0). Numbers behind the enumerations differ between versions, so they are used by name only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol, cast

from fxsparse.errors import TargetError

OLDEST = (10, 12)  # strongly typed networks without exceptions


class HostMemory(Protocol):
    """`IHostMemory`: bytes, by the buffer protocol."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class TimingCache(Protocol):
    """`ITimingCache`"""

    def serialize(self) -> HostMemory: ...


class OptimizationProfile(Protocol):
    """`IOptimizationProfile`"""

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None: ...


class BuilderConfig(Protocol):
    """`IBuilderConfig`"""

    profiling_verbosity: object

    def set_flag(self, flag: object) -> None: ...
    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Network(Protocol):
    """`INetworkDefinition`"""

    @property
    def num_layers(self) -> int: ...


class IBuilder(Protocol):
    """`Builder`"""

    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(self, network: Network, config: BuilderConfig) -> HostMemory | None: ...


class ParserError(Protocol):
    """`ParserError`"""

    def desc(self) -> str: ...


class IParser(Protocol):
    """`OnnxParser`"""

    @property
    def num_errors(self) -> int: ...
    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class ExecutionContext(Protocol):
    """`IExecutionContext`"""

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class CudaEngine(Protocol):
    """`ICudaEngine`"""

    @property
    def num_io_tensors(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> object: ...
    def get_tensor_dtype(self, name: str) -> object: ...
    def create_execution_context(self) -> ExecutionContext | None: ...


class IRuntime(Protocol):
    """`Runtime`"""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...


class _CreationFlags(Protocol):
    STRONGLY_TYPED: Any


class _BuilderFlags(Protocol):
    SPARSE_WEIGHTS: object


class _Verbosity(Protocol):
    DETAILED: object


class _TensorIOMode(Protocol):
    INPUT: object


class TensorRT(Protocol):
    """The module."""

    __version__: str
    NetworkDefinitionCreationFlag: _CreationFlags
    BuilderFlag: _BuilderFlags
    ProfilingVerbosity: _Verbosity
    TensorIOMode: _TensorIOMode
    DataType: Any  # FLOAT, HALF, BF16, INT32, INT64, BOOL, INT8, UINT8
    ILogger: type  # to be subclassed: log(self, severity, msg)

    def Builder(self, logger: object) -> IBuilder: ...
    def OnnxParser(self, network: Network, logger: object) -> IParser: ...
    def Runtime(self, logger: object) -> IRuntime: ...


def load(do: str) -> TensorRT:
    """The module `tensorrt`. Raises TargetError, with the advice `do`, when it is missing, broken or too old."""
    wanted = f"tensorrt {'.'.join(map(str, OLDEST))} or newer"
    if importlib.util.find_spec("tensorrt") is None:
        raise _missing(wanted, "no such package", do)
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise _missing(wanted, f"one that does not load: {type(error).__name__}: {error}", do) from None
    version = str(module.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise _missing(wanted, version, do)
    return cast(TensorRT, module)


def _missing(wanted: str, got: str, do: str) -> TargetError:
    return TargetError("target 'tensorrt'", expected=f"the package {wanted}", got=got, do=do)
