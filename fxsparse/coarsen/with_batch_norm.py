"""Masks for the batch norms and biases of rows that are wholly masked, so that such a row is zero, not a constant.

row i of a convolution without weights, then its batch norm:
    y_i = b_i,   z_i = gamma_i * (b_i - mu_i) / sigma_i + beta_i     # a constant, and after padding not even that
    b_i, gamma_i, beta_i masked  =>  y_i = z_i = 0
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxsparse.errors import InputError
from fxsparse.ir.masks import Masks

_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def with_batch_norm(model: nn.Module, masks: Mapping[str, Tensor]) -> Masks:
    """These masks, and those of the biases and batch norms that belong to wholly masked rows.

    For every row of a convolution or linear weight [O, ...] that its mask drops whole: element i of the bias, and of
    the weight and bias of the batch norm that reads the output. A batch norm that is used more than once keeps a
    channel that any of its inputs keeps. A linear layer before a batch norm is taken to give [N, C].

    **This changes the function**: with the weights alone masked, such a channel is a constant that the next layers
    read; with these masks it is zero. That is what makes the channel removable without leaving a trace, and it is why
    this is in `coarsen` and `fxsparse.compile` never does it. Fine-tune afterwards. The model itself is not changed.

    The readers are found with torch.fx.symbolic_trace. Raises InputError when the model cannot be traced, MaskError
    when a mask does not fit the model.
    """
    checked = Masks(masks).check(model)
    if not any(_has_dropped_row(mask) for mask in checked.values()):
        return checked
    own_name = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, Tensor] = dict(checked)
    for module, live in _live_channels(model, own_name, checked):
        for key in ("weight", "bias") if isinstance(module, _BatchNorm) else ("bias",):
            parameter = module._parameters.get(key)
            if parameter is not None:
                name = own_name[id(parameter)]
                found[name] = live & found[name].to(live.device) if name in found else live
    return Masks(found)


def _live_channels(
    model: nn.Module, own_name: Mapping[int, str], masks: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layers with dropped output channels, each once: convolutions and linear layers, then batch norms."""
    modules = dict(model.named_modules(remove_duplicate=False))
    rows = {id(m): _live_rows(m, own_name, masks) for m in modules.values() if isinstance(m, _PRODUCERS)}
    norms: dict[int, tuple[_BatchNorm, Tensor]] = {}
    for node in _trace(model).nodes:
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, _BatchNorm):
            read = _rows_read_by(node, module, modules, rows)
            before = norms.get(id(module))
            norms[id(module)] = (module, read if before is None else read | before[1].to(read.device))
    yield from ((m, live) for m in model.modules() if (live := rows.get(id(m))) is not None)
    yield from ((norm, live) for norm, live in norms.values() if not bool(live.all()))


def _live_rows(module: nn.Module, own_name: Mapping[int, str], masks: Mapping[str, Tensor]) -> Tensor | None:
    """Which output channels [O] have weights; None when all have."""
    for key in ("weight", "weight_orig"):
        parameter = module._parameters.get(key)
        mask = masks.get(own_name[id(parameter)]) if parameter is not None else None
        if mask is not None and _has_dropped_row(mask):
            return mask.flatten(1).any(1)
    return None


def _rows_read_by(
    node: fx.Node, norm: _BatchNorm, modules: Mapping[str, nn.Module], rows: Mapping[int, Tensor | None]
) -> Tensor:
    """Which channels [C] of the batch norm's input are not masked away."""
    source = node.all_input_nodes[0]
    while source.op == "call_module" and isinstance(modules[str(source.target)], _TRANSPARENT):
        source = source.all_input_nodes[0]
    live = rows.get(id(modules[str(source.target)])) if source.op == "call_module" else None
    if live is not None and len(live) == norm.num_features:
        return live
    return torch.ones(norm.num_features, dtype=torch.bool, device="cpu")


def _has_dropped_row(mask: Tensor) -> bool:
    return mask.dim() >= 2 and not bool(mask.flatten(1).any(1).all())


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return fx.symbolic_trace(model).graph
    except Exception as error:  # a model's forward can fail on a proxy in any way
        raise InputError(
            f"model {type(model).__name__}",
            expected="a model that torch.fx.symbolic_trace can trace, to find the batch norm after each convolution",
            got=f"{type(error).__name__}: {error}",
            do="Add the masks of its batch norms by hand: masks[conv].flatten(1).any(1) for their weight and bias.",
        ) from error
