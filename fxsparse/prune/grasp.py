"""GraSP: keep the weights without which the gradient would be smaller.

g = dL/dw, H = d2L/dw2, both summed over the batches
removing w_q changes g^T g by about -2 w_q (H g)_q;  the paper's score is S_q = -w_q (H g)_q, and the highest S go
score = w * (H g), with its sign: keep the largest. H g is the gradient of g^T stop(g), without H
Source: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow (ICLR 2020), section 4,
Algorithms 1 and 2. The paper divides scores by their sum's magnitude, which ranks them no differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxsparse.errors import InputError
from fxsparse.ir.masks import Masks
from fxsparse.prune.losses import Loss, gradient, losses, several
from fxsparse.prune.magnitude import budget, keep_largest
from fxsparse.prune.prunable import prunable
from fxsparse.prune.stateless import flat, unchanged, variables, wide


def grasp(
    model: nn.Module, loss: Loss, batches: Iterable[Any], density: float, *, exclude: Iterable[str] = ()
) -> Masks:
    """Keep the round(density * total) weights of largest signed w * (H g), counted over all layers together.

    loss     loss(model, batch) -> scalar tensor. The temperature belongs here: the paper's is 200,
             F.cross_entropy(model(batch[0]) / 200, batch[1])
    batches  whatever loss takes; read once and gone through twice. The paper takes ten samples or more of each class
    density  fraction of the weights to keep, 0 < density <= 1
    exclude  modules or parameters to leave dense; the head always is, see `prunable`. They are no part of g and H

    The model runs in the mode it is in; the released code's is training mode. It is left as it was, and so are torch's
    generators. Dropout draws other masks in each of the two passes. The count is exact; of equal scores the earlier is
    kept. Takes the memory of two backward passes. Warns when a layer is left without weights. Raises InputError on a
    density outside the range, no batches, scores that are not finite, a loss that is no finite scalar, and one whose
    gradient does not depend on the weights.
    """
    weights = prunable(model, exclude=exclude)
    keep = budget(weights, density)
    # only the plain form of attention can be differentiated twice
    with unchanged(model), sdpa_kernel(SDPBackend.MATH):
        hg = _hessian_gradient_product(model, loss, batches, variables(weights))
    scores = {name: wide(w) * each for (name, w), each in zip(weights.items(), hg, strict=True)}
    return keep_largest(flat(scores), weights, keep)


def _hessian_gradient_product(
    model: nn.Module, loss: Loss, batches: Iterable[Any], weights: dict[str, Tensor]
) -> list[Tensor]:
    batches = list(several(batches))
    variables = list(weights.values())
    fixed = gradient(model, loss, batches, weights)
    product = [torch.zeros_like(g) for g in fixed]
    for value in losses(model, loss, batches, weights):
        g = torch.autograd.grad(value, variables, create_graph=True, materialize_grads=True)
        flow = torch.stack([(wide(each) * stop).sum() for each, stop in zip(g, fixed, strict=True)]).sum()
        if not flow.requires_grad:
            raise InputError("loss", expected="one with second derivatives", got="a gradient that is constant",
                             do="A loss that is linear in the weights has no curvature; snip needs none.")  # fmt: skip
        hg = torch.autograd.grad(flow, variables, materialize_grads=True)
        product = [p + each for p, each in zip(product, hg, strict=True)]
    return product
