"""Every torchvision classification model, pruned, compiled for ONNX, exported and compared with ONNX Runtime.

    python -m tools.onnx_models [NAME ...] [--half] > rows.jsonl

One JSON line per model: how far ONNX Runtime is from float64 at every batch size, or the error. Random weights; masks
of shuffled blocks at 74 % sparsity in groups of 32 rows. Takes half an hour; big models need 20 GB of memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import fxsparse
from tools.block_recipes import shuffled_blocks

# The smallest sides that these models accept; all others take 64.
SIDES = {"alexnet": 96, "inception_v3": 96, "googlenet": 96, "maxvit_t": 224, "vit": 224, "densenet": 64}


def side(name: str) -> int:
    """Height and width of the input."""
    return next((size for prefix, size in SIDES.items() if name.startswith(prefix)), 64)


def row(name: str, folder: Path, half: bool) -> dict[str, object]:
    """One model."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    masks = shuffled_blocks(model, sparsity=0.74, seed=0, rows=32)
    dtype = torch.float16 if half else torch.float32
    size = next((getattr(m, "image_size", None) for m in model.modules() if hasattr(m, "image_size")), None) or side(
        name
    )
    x, start = torch.randn(1, 3, size, size, dtype=dtype), time.perf_counter()
    try:
        fast = fxsparse.compile(model.to(dtype), masks, "onnx", example_inputs=(x,), measure=False)
        file = fxsparse.export_onnx(fast, folder / "model.onnx")
    except fxsparse.FxSparseError as error:
        return {"model": name, "dtype": str(dtype), "error": f"{type(error).__name__}: {error}"}
    packed = sum(r.stored != "dense" for r in fast.report.rows)
    return {
        "model": name, "dtype": str(dtype), "side": size, "packed_layers": packed, "layers": len(fast.report.rows),
        "verified": file.verified, "not_in_tensorrt": file.not_in_tensorrt, "seconds": time.perf_counter() - start,
        "bytes": sum(f.stat().st_size for f in file.files),
    }  # fmt: skip


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=torchvision.models.list_models(module=torchvision.models))
    parser.add_argument("--half", action="store_true", help="float16")
    arguments = parser.parse_args()
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(row(name, Path(folder), arguments.half)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
