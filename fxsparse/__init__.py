"""fxsparse: the sparsity compiler for PyTorch.

`compile(model, masks, example_inputs=(x,))` returns a module that computes the same function, faster, verified and
measured; `plan(model, masks, (x,))` is the dry run: what would go, what would not, and why.
"""

from fxsparse.compiler import compile, plan
from fxsparse.errors import (
    CaptureError,
    FxSparseError,
    InputError,
    MaskError,
    PackageError,
    TargetError,
    VerificationError,
)
from fxsparse.export import OnnxFile, TensorRtFile, export_onnx, export_tensorrt
from fxsparse.ir.masks import Masks
from fxsparse.ir.version import VERSION
from fxsparse.loading import load
from fxsparse.module import SparseModule
from fxsparse.readers import Checkpoint, read
from fxsparse.report import Report

__version__ = VERSION

__all__ = [
    "CaptureError",
    "Checkpoint",
    "FxSparseError",
    "InputError",
    "MaskError",
    "Masks",
    "OnnxFile",
    "PackageError",
    "Report",
    "SparseModule",
    "TargetError",
    "TensorRtFile",
    "VerificationError",
    "compile",
    "export_onnx",
    "export_tensorrt",
    "load",
    "plan",
    "read",
]
