"""TensorRT on an NVIDIA GPU, by way of ONNX. Not run on a real TensorRT yet: see fxsparse.deploy.tensorrt_build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxsparse.backend.target import Runnable, Target
from fxsparse.deploy.onnx_model import OnnxModel, require, to_onnx
from fxsparse.deploy.tensorrt_api import TensorRT, load
from fxsparse.deploy.tensorrt_build import Profile
from fxsparse.deploy.tensorrt_runtime import TensorRtModule
from fxsparse.errors import TargetError
from fxsparse.ir.graph import flat, input_devices
from fxsparse.ir.inputs import batch_size
from fxsparse.verify import check, reference

DEVICE = "cuda"
ANY_BATCH = Profile(1, 16, 64)  # of the engine for other batch sizes than the example's
WITHOUT = (
    "pip install 'fxsparse[tensorrt]' on a machine with an NVIDIA GPU; or write the ONNX file here, with the trtexec "
    "line that builds it there: fxsparse.export_tensorrt(fxsparse.compile(model, masks, 'eager', example_inputs=(x,)), "
    "'model.onnx', engine=False)."
)


class TensorRt(Target):
    """float32, float16 and bfloat16, as the module is. An engine for the example's batch size, another for any."""

    name = "tensorrt"
    standard_operators = True
    memory_formats = ("contiguous",)
    rivals = ()

    def require(self) -> None:
        tensorrt()

    def formats(self, device: torch.device) -> tuple[str, ...]:
        return ("shuffled_block",)

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        return self._module(gm, inputs, sparse=True)

    def lower_dense(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        return self._module(gm, inputs, sparse=False)

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        model = _onnx(gm)

        def compare(given: Sequence[Any], outputs: Sequence[Any]) -> None:
            check(outputs, reference(flat(gm), given), "target 'tensorrt' at another batch size",
                  "The graph was right before lowering: please report it.")  # fmt: skip

        return TensorRtModule(tensorrt(), model, ANY_BATCH, sparse=True, check=compare)

    def _module(self, gm: fx.GraphModule, inputs: Sequence[Any], *, sparse: bool) -> Runnable:
        batch = batch_size(inputs)
        return TensorRtModule(tensorrt(), _onnx(gm), Profile(batch, batch, batch), sparse=sparse)


def tensorrt() -> TensorRT:
    """The module. Raises TargetError without it, without ONNX or without a GPU."""
    module = load(WITHOUT)
    require("onnx", "onnxscript", what="target 'tensorrt'")
    if not has_gpu():
        raise TargetError("target 'tensorrt'", expected="an NVIDIA GPU that PyTorch sees", got="none", do=WITHOUT)
    return module


def has_gpu() -> bool:
    """Whether PyTorch sees one."""
    return torch.cuda.is_available()


def _onnx(gm: fx.GraphModule) -> OnnxModel:
    elsewhere = {str(device) for device in input_devices(gm) if not _is_current(device)}
    if elsewhere:
        raise TargetError("target 'tensorrt'", expected="a model and inputs on the current GPU",
                          got=", ".join(sorted(elsewhere)),
                          do="Pass model.cuda().half(), say, and inputs that are there too.")  # fmt: skip
    return to_onnx(gm)


def _is_current(device: torch.device) -> bool:
    """Engines are built for, and run on, the current GPU."""
    return device.type == DEVICE and (DEVICE != "cuda" or device.index in (None, torch.cuda.current_device()))
