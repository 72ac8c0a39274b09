"""A natively slim model: the user's own module with every layer built anew at the widths that were kept.

It is what a person who knew the widths would have written: nn.Conv2d, nn.BatchNorm2d, nn.Linear, random weights. It
does not compute the same function; it runs at the speed the same function should have.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import fxsparse


def native_slim(model: nn.Module, report: fxsparse.Report) -> nn.Module:
    """`model` with the widths of `report`. Works where widths are not written into `forward`."""
    slim = copy.deepcopy(model)
    norms = _norm_after(model)
    for row in report.rows:
        name = row.name.removesuffix(".weight")
        layer = slim.get_submodule(name)
        _replace(slim, name, _like(layer, row.new_shape))
        if name in norms:
            _replace(slim, norms[name], nn.BatchNorm2d(row.new_shape[0]))
    return slim.eval()


def _like(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        groups = 1 if layer.groups == 1 else shape[0] // (layer.out_channels // layer.groups)
        old: Any = layer  # its sizes are typed tuple[int, ...], which nn.Conv2d does not take
        sizes = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding, "dilation": old.dilation}
        return nn.Conv2d(shape[1] * groups, shape[0], **sizes, groups=groups, bias=layer.bias is not None)
    return nn.Linear(shape[1], shape[0], bias=layer.bias is not None)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    parameter = next(old.parameters())
    setattr(model.get_submodule(parent), leaf, new.to(parameter.device, parameter.dtype).eval())


def _norm_after(model: nn.Module) -> dict[str, str]:
    """Convolution -> the batch norm that alone reads it."""
    graph = torch.fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    return {
        str(node.args[0].target): str(node.target)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.BatchNorm2d)
        and isinstance(node.args[0], torch.fx.Node) and node.args[0].op == "call_module"
        and isinstance(modules[str(node.args[0].target)], nn.Conv2d)
    }  # fmt: skip
