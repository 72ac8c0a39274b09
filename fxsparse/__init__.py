"""fxsparse: the sparsity compiler for PyTorch.

`compile(model, masks, example_inputs=(x,))` returns a module that computes the same function, faster, verified and
measured; `plan(model, masks, (x,))` is the dry run: what would go, what would not, and why. `fxsparse.prune`,
`fxsparse.coarsen` and `fxsparse.train` make masks; they are imported when they are first named.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from fxsparse import coarsen as coarsen
    from fxsparse import prune as prune
    from fxsparse import train as train

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
_PARTS = ("coarsen", "prune", "train")

if not TYPE_CHECKING:  # a type checker would take any name for one of them

    def __getattr__(name: str) -> ModuleType:
        if name in _PARTS:
            return importlib.import_module(f"fxsparse.{name}")
        raise AttributeError(f"module 'fxsparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS, "__version__"])
