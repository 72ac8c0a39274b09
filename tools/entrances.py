"""The same model through torch.compile, and what TorchDynamo alone takes of that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fxsparse
from tools.subjects import Inputs, without_grad


def through_torch_compile(
    model: nn.Module, masks: fxsparse.Masks, inputs: Inputs, target: str, fast: fxsparse.SparseModule
) -> dict[str, Callable[[], object]]:
    """`torch.compile`: our back end. `torch.compile alone`: TorchDynamo around `fast`, whatever it hands over."""
    graphs: list[torch.fx.GraphModule] = []

    def alone(gm: torch.fx.GraphModule, example: list[Any]) -> Callable[..., object]:
        graphs.append(gm)
        if len(graphs) > 1:
            raise SystemExit("a model of several graphs cannot be timed with TorchDynamo alone")
        return lambda *arguments: tree_leaves(fast(*inputs))

    def masked() -> nn.Module:
        copied = copy.deepcopy(model)
        masks.apply_(copied)
        return copied

    ways: Mapping[str, Any] = {
        "torch.compile": {"backend": "fxsparse", "options": {"masks": masks, "target": target}},
        "torch.compile alone": {"backend": alone},
    }
    return {name: without_grad(torch.compile(masked(), **way), inputs) for name, way in ways.items()}
