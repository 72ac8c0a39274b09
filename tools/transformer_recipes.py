"""The mask recipe of transformers: whole attention heads and hidden neurons. See `tools.recipes` for the others."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tools.recipes import ACTIVATIONS


def heads_and_neurons(model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]:
    """Of every nn.MultiheadAttention random heads, of every linear layer before an activation random rows, with biases.

    Of a LLaMA (transformers), random key heads with their queries and outputs, and random hidden neurons.
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
                masks |= _rows_of(f"{name}.{key}", layer, alive)
        if hasattr(module, "num_key_value_groups"):
            masks |= _grouped_heads(name, module, sparsity, generator)
        if hasattr(module, "gate_proj"):
            masks |= _gated_neurons(name, module, sparsity, generator)
    return masks


def _grouped_heads(name: str, module: Any, sparsity: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Outputs too: a dead head reads what the cache kept of it."""
    k, q, out = module.k_proj, module.q_proj, module.o_proj
    keys = _alive(k.out_features // module.head_dim, sparsity, generator).repeat_interleave(module.head_dim)
    queries = keys.view(-1, module.head_dim).repeat_interleave(module.num_key_value_groups, 0).flatten()
    masks = _rows_of(f"{name}.q_proj", q, queries)
    for key in ("k_proj", "v_proj"):
        masks |= _rows_of(f"{name}.{key}", getattr(module, key), keys)
    return masks | {f"{name}.o_proj.weight": queries.expand_as(out.weight).clone()}


def _gated_neurons(name: str, module: Any, sparsity: float, generator: torch.Generator) -> dict[str, Tensor]:
    alive = _alive(module.gate_proj.out_features, sparsity, generator)
    masks = _rows_of(f"{name}.gate_proj", module.gate_proj, alive)
    return masks | _rows_of(f"{name}.up_proj", module.up_proj, alive)


def _alive(n: int, sparsity: float, generator: torch.Generator) -> Tensor:
    kept = torch.ones(n, dtype=torch.bool)
    kept[torch.randperm(n, generator=generator)[: round(n * sparsity)]] = False
    return kept


def _rows_of(name: str, layer: Any, alive: Tensor) -> dict[str, Tensor]:
    return _rows(f"{name}.", layer.weight, layer.bias, alive)


def _rows(prefix: str, weight: Tensor, bias: Tensor | None, alive: Tensor) -> dict[str, Tensor]:
    masks = {f"{prefix}weight": alive[:, None].expand_as(weight).clone()}
    return masks if bias is None else {**masks, f"{prefix}bias": alive}
