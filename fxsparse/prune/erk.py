"""Random masks with Erdos-Renyi-kernel densities: small layers are kept denser than large ones.

density of layer l = scale * sum(shape_l) / prod(shape_l), at most 1; `scale` such that `density` of all weights stay
Layers that would exceed 1 are dense, and the scale of the others is solved for again, until none exceeds 1.
Source: Evci et al., Rigging the Lottery (ICML 2020), section 3, (1) sparsity distribution, for kernels; Mocanu et al.,
Scalable training of artificial neural networks with adaptive sparse connectivity (2018), for linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.ir.masks import Masks
from fxsparse.prune.magnitude import budget, keep_largest


def erk_densities(weights: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """The fraction to keep of each weight, `density` of all together; 1.0 where the formula would exceed it.

    weights  parameter name -> tensor [O, I, ...]; the values are not looked at
    density  fraction of all weights to keep, 0 < density <= 1

    Raises InputError on a density outside the range, and without weights.
    """
    budget(weights, density)
    ratio = {name: sum(w.shape) / max(1, w.numel()) for name, w in weights.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(w.numel() for w in weights.values()) - sum(weights[n].numel() for n in dense)
        share = sum(ratio[n] * w.numel() for n, w in weights.items() if n not in dense)
        scale = left / share if share else 0.0  # all dense
        over = {n for n in weights if n not in dense and ratio[n] * scale > 1}
        if not over:
            return {n: 1.0 if n in dense else ratio[n] * scale for n in weights}
        dense |= over


def erk(weights: Mapping[str, Tensor], density: float, *, seed: int) -> Masks:
    """Keep round(density * total) weights: `erk_densities` of each layer, at positions drawn uniformly within it.

    weights  parameter name -> tensor [O, I, ...]; the values are not looked at
    density  fraction of all weights to keep, 0 < density <= 1
    seed     the same seed and shapes give the same masks, on every device; torch's own generator is not touched

    The count is exact: layers are rounded down, and those of the largest remainders up, of equal ones the earlier.
    Warns when a layer is left without weights. Raises InputError on a density outside the range.
    """
    keep = budget(weights, density)
    counts = _rounded({n: d * weights[n].numel() for n, d in erk_densities(weights, density).items()}, keep)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = {
        name: torch.randperm(weight.numel(), generator=generator, device="cpu") < counts[name]
        for name, weight in weights.items()
    }
    return keep_largest({name: chosen.int() for name, chosen in drawn.items()}, weights, keep)


def _rounded(exact: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that add up to `total`, by the method of the largest remainder."""
    counts = {name: int(number) for name, number in exact.items()}
    up = sorted(exact, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]
    return {name: count + (name in up) for name, count in counts.items()}
