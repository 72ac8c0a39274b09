"""The mask recipe of transformers: whole attention heads and hidden neurons. See `tools.recipes` for the others."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from tools.recipes import ACTIVATIONS


def heads_and_neurons(model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]:
    """Of every nn.MultiheadAttention random heads, of every linear layer before an activation random rows, with biases.

    The width of the residual stream stays, as in structured pruning of transformers.
    """
    generator = torch.Generator().manual_seed(seed)
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            alive = _alive(module.num_heads, sparsity, generator).repeat_interleave(module.head_dim).repeat(3)
            masks |= _rows(f"{name}.in_proj_", module.in_proj_weight, module.in_proj_bias, alive)
        for (key, layer), (_, after) in pairwise(module.named_children()):
            if isinstance(layer, nn.Linear) and isinstance(after, ACTIVATIONS):
                alive = _alive(layer.out_features, sparsity, generator)
                masks |= _rows(f"{name}.{key}.", layer.weight, layer.bias, alive)
    return masks


def _alive(n: int, sparsity: float, generator: torch.Generator) -> Tensor:
    kept = torch.ones(n, dtype=torch.bool)
    kept[torch.randperm(n, generator=generator)[: round(n * sparsity)]] = False
    return kept


def _rows(prefix: str, weight: Tensor, bias: Tensor | None, alive: Tensor) -> dict[str, Tensor]:
    masks = {f"{prefix}weight": alive[:, None].expand_as(weight).clone()}
    return masks if bias is None else {**masks, f"{prefix}bias": alive}
