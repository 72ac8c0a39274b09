"""SNIP: keep the connections that change the loss most.

mask m multiplies the weights w, all ones:  dL/dm = g * w,  g = dL/dw
score = |g * w|, g summed over the batches
Source: Lee et al., SNIP: Single-shot network pruning based on connection sensitivity (ICLR 2019), section 4 and
Algorithm 1. The paper divides the scores by their sum, which ranks them no differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fxsparse.ir.masks import Masks
from fxsparse.prune.losses import Loss, gradient
from fxsparse.prune.magnitude import budget, keep_largest
from fxsparse.prune.prunable import prunable
from fxsparse.prune.stateless import flat, unchanged, variables, wide


def snip(model: nn.Module, loss: Loss, batches: Iterable[Any], density: float, *, exclude: Iterable[str] = ()) -> Masks:
    """Keep the round(density * total) weights of largest |g * w|, counted over all layers together.

    loss     loss(model, batch) -> scalar tensor, such as F.cross_entropy(model(batch[0]), batch[1])
    batches  whatever loss takes; the paper takes one, of the training data. Each counts alike, whatever its size
    density  fraction of the weights to keep, 0 < density <= 1
    exclude  modules or parameters to leave dense; the head always is, see `prunable`

    The model runs in the mode it is in; the paper's is training mode, where batch norms use the batch's statistics.
    It is left as it was, and so are torch's generators: dropout draws the same again. The count is exact; of equal
    scores the earlier is kept. In float16 gradients below 6e-8 are 0: multiply the loss, which changes no rank.
    Warns when a layer is left without weights. Raises InputError on a density outside the range, no batches, scores
    that are not finite, and a loss that is no finite scalar or does not depend on the weights.
    """
    weights = prunable(model, exclude=exclude)
    keep = budget(weights, density)
    with unchanged(model):
        g = gradient(model, loss, batches, variables(weights))
    scores = {name: (each * wide(w)).abs() for (name, w), each in zip(weights.items(), g, strict=True)}
    return keep_largest(flat(scores), weights, keep)
