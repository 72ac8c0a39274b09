"""Every torchvision classification model, pruned, compiled for ONNX, exported and compared with ONNX Runtime.

    python -m tools.onnx_models [NAME ...] [--masks blocks] [--dtype float16] > rows.jsonl

One JSON line per model: how far ONNX Runtime is from float64 at every batch size, or the error. Random weights; masks
of random rows, or of shuffled blocks at 74 % sparsity in groups of 32 rows. All models take an hour and 20 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor

import fxsparse
from tools.block_recipes import shuffled_blocks

# The smallest sides that these models accept; all others take 64.
SIDES = {"alexnet": 96, "inception_v3": 96, "googlenet": 96, "maxvit_t": 224, "vit": 224}


def side(name: str) -> int:
    """Height and width of the input."""
    return next((size for prefix, size in SIDES.items() if name.startswith(prefix)), 64)


def random_rows(model: torch.nn.Module) -> dict[str, Tensor]:
    """A random 70 % of the rows of every weight but the classifier's."""
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() in (2, 4)][:-1]
    return {n: (torch.rand(len(p)) < 0.7).view(-1, *[1] * (p.dim() - 1)).expand_as(p) for n, p in weights}


MASKS: dict[str, Callable[[torch.nn.Module], dict[str, Tensor]]] = {
    "rows": random_rows,
    "blocks": partial(shuffled_blocks, sparsity=0.74, seed=0, rows=32),
}


def row(name: str, folder: Path, kind: str, dtype: torch.dtype) -> dict[str, object]:
    """One model."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    for p in model.parameters():  # the heads of vision transformers begin as zeros, and so would every output
        if p.dim() > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    masks, size = MASKS[kind](model), getattr(model, "image_size", None) or side(name)
    x, start = torch.randn(1, 3, size, size, dtype=dtype), time.perf_counter()
    common = {"model": name, "masks": kind, "dtype": str(dtype).removeprefix("torch."), "side": size}
    try:
        fast = fxsparse.compile(model.to(dtype), masks, "eager", example_inputs=(x,), measure=False)
        file = fxsparse.export_onnx(fast, folder / "model.onnx")
    except fxsparse.FxSparseError as error:
        return {**common, "error": f"{type(error).__name__}: {error}"}
    packed = sum(r.stored != "dense" for r in fast.report.rows)
    return {
        **common, "packed_layers": packed, "layers": len(fast.report.rows), "verified": file.verified,
        "not_in_tensorrt": file.not_in_tensorrt, "seconds": round(time.perf_counter() - start, 1),
        "mbytes": round(sum(f.stat().st_size for f in file.files) / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=torchvision.models.list_models(module=torchvision.models))
    parser.add_argument("--masks", choices=sorted(MASKS), default="rows")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    arguments = parser.parse_args()
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            found = row(name, Path(folder), arguments.masks, getattr(torch, arguments.dtype))
            print(json.dumps(found), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
