"""ONNX Runtime on a CPU, with the model in standard operators that any other ONNX runtime reads too."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxsparse.backend.target import Runnable, Target
from fxsparse.deploy.onnx_model import require, to_onnx
from fxsparse.deploy.onnx_runtime import OnnxSession
from fxsparse.errors import TargetError
from fxsparse.ir.graph import input_devices


class Onnx(Target):
    """float32, float64 and float16. One session serves every batch size."""

    name = "onnx"
    standard_operators = True
    memory_formats = ("contiguous",)
    rivals = ()
    one_for_all_sizes = True

    def __init__(self) -> None:
        self.sessions: weakref.WeakKeyDictionary[fx.GraphModule, OnnxSession] = weakref.WeakKeyDictionary()

    def require(self) -> None:
        require("onnx", "onnxscript", "onnxruntime", what="target 'onnx'")

    def formats(self, device: torch.device) -> tuple[str, ...]:
        return ("shuffled_block",)

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        return self.lower_dynamic(gm)

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        if gm not in self.sessions:
            _refuse_device(gm)
            self.sessions[gm] = OnnxSession(to_onnx(gm))
        return self.sessions[gm]


def _refuse_device(gm: fx.GraphModule) -> None:
    elsewhere = {str(device) for device in input_devices(gm) if device.type != "cpu"}
    if elsewhere:
        raise TargetError("target 'onnx'", expected="a model and inputs on the CPU", got=", ".join(sorted(elsewhere)),
                          do="Pass model.cpu() and inputs on the CPU; the exported file runs anywhere.")  # fmt: skip
