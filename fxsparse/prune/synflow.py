"""SynFlow: keep the weights that carry most of what can flow through the network. It needs no data.

R = sum of the outputs for inputs of ones, with |.| of every parameter and buffer;  score = |w * dR/dw|
repeat for k = 1 ... n: mask the weights, score them, keep density^(k / n) of them
Without biases the scores of every layer of a chain add up to R, so the fewer weights a layer has left, the larger their
scores. In small steps none of them is emptied while others have weights to lose; in one step wide layers are. A layer
beside others (a shortcut's convolution) carries less than R and may be emptied.
Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow (NeurIPS 2020),
sections 5 and 6, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxsparse.errors import InputError
from fxsparse.ir.inputs import Call
from fxsparse.ir.masks import Masks
from fxsparse.prune.magnitude import budget, keep_largest, largest_of_all
from fxsparse.prune.prunable import prunable
from fxsparse.prune.stateless import flat, unchanged, variables


def synflow(
    model: nn.Module, example_inputs: Any, density: float, *, iterations: int = 100, exclude: Iterable[str] = ()
) -> Masks:
    """Keep round(density * total) weights, counted over all layers together, by `iterations` rounds of synaptic flow.

    example_inputs  a tensor, a tuple of positional inputs or a dict by name: their shapes, one sample will do
    density         fraction of the weights to keep, 0 < density <= 1
    iterations      rounds; the paper takes 100. With 1 whole layers may be emptied
    exclude         modules or parameters to leave dense; the head always is, see `prunable`

    Runs in float64, as the flow of deep networks exceeds float32, and in evaluation mode, as the authors' code does: a
    batch norm in training mode would take the flow for its mean and subtract it. So do layer, group and instance norms
    in any mode, and nothing sensible comes of them. The model is left as it was. The count is exact; of equal scores
    the earlier is kept. Warns when a layer is left without weights. Raises InputError on numbers outside their range,
    outputs that do not depend on the weights, and scores that are not finite.
    """
    weights = prunable(model, exclude=exclude)
    keep = budget(weights, density)
    if iterations < 1:
        raise InputError(f"iterations {iterations!r}", expected="at least 1", got=repr(iterations),
                         do="The paper takes 100; more steps are smaller steps.")  # fmt: skip
    masks = Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})
    with unchanged(model):
        call: Call = pytree.tree_map_only(Tensor, _ones, Call.of(example_inputs))
        tensors = {n: _magnitude(t.detach()) for n, t in (*model.named_parameters(), *model.named_buffers())}
        for module in model.modules():
            module.training = False
        for k in range(1, iterations):
            masks = largest_of_all(
                _scores(model, call, tensors, masks), weights, budget(weights, density ** (k / iterations))
            )
        return keep_largest(_scores(model, call, tensors, masks), weights, keep)


def _scores(model: nn.Module, call: Call, tensors: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """|w * dR/dw|, flat; -1 where w is pruned already."""
    weights = variables({name: tensors[name] * mask for name, mask in masks.items()})
    outputs = functional_call(model, {**tensors, **weights}, call.args, dict(call.kwargs))
    flow = sum(out.sum() for out in pytree.tree_leaves(outputs) if isinstance(out, Tensor) and out.requires_grad)
    if not isinstance(flow, Tensor):
        raise InputError("model", expected="outputs that depend on its weights", got="none with a gradient",
                         do="Its forward must not run under no_grad, nor detach its result.")  # fmt: skip
    grads = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    scores = {name: (w * g).abs() for (name, w), g in zip(weights.items(), grads, strict=True)}
    return {name: s.masked_fill(~masks[name].cpu().reshape(-1), -1) for name, s in flat(scores).items()}


def _ones(example: Tensor) -> Tensor:
    return _magnitude(torch.ones_like(example))


def _magnitude(tensor: Tensor) -> Tensor:
    return tensor.abs().double() if tensor.is_floating_point() else tensor.clone()
