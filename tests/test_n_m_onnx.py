"""2:4 as an independent tool sees it: `polygraphy inspect sparsity` on an exported ONNX file."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from fxsparse import Masks
from fxsparse.coarsen import n_m
from fxsparse.formats.n_m import misfits

POLYGRAPHY = Path(sys.executable).with_name("polygraphy")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.Flatten(),
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 5, bias=False),
    ).eval()  # fmt: skip


def test_polygraphy_finds_the_same_layers_two_four(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    if not POLYGRAPHY.exists():
        pytest.skip("polygraphy is not installed")
    net = model()
    weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}
    ones = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    masks = dict(n_m(weights, ones, exclude=["4", "9"]).masks)
    masks["8.weight"][3, 4:8] = True  # one group of four is full
    Masks(masks).apply_(net)
    divides = {name: p != 0 for name, p in net.named_parameters() if p.dim() > 1 and p.shape[1] % 4 == 0}
    ours = {name: misfits(mask, 2, 4) == 0 for name, mask in divides.items()}
    assert ours == {"2.weight": True, "4.weight": False, "6.weight": True, "8.weight": False, "9.weight": False}
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.randn(1, 3, 6, 6),), path, dynamo=True, external_data=False, verbose=False)
    run = subprocess.run([POLYGRAPHY, "inspect", "sparsity", path], capture_output=True, text=True, check=True)
    theirs = re.findall(r"Found (sparse|non-sparse) tensor: (\S+)", run.stdout + run.stderr)
    assert {name: kind == "sparse" for kind, name in theirs} == ours
