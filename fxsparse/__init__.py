"""fxsparse: the sparsity compiler for PyTorch.

`compile(model, masks, example_inputs=(x,))` returns a module that computes the same function, faster, verified and
measured; `plan(model, masks, (x,))` is the dry run: what would go, what would not, and why.
"""

from fxsparse.compiler import compile, plan
from fxsparse.errors import CaptureError, FxSparseError, InputError, MaskError, TargetError, VerificationError
from fxsparse.export import OnnxFile, TensorRtFile, export_onnx, export_tensorrt
from fxsparse.ir.masks import Masks
from fxsparse.module import SparseModule
from fxsparse.report import Report

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "FxSparseError",
    "InputError",
    "MaskError",
    "Masks",
    "OnnxFile",
    "Report",
    "SparseModule",
    "TargetError",
    "TensorRtFile",
    "VerificationError",
    "compile",
    "export_onnx",
    "export_tensorrt",
    "plan",
]
