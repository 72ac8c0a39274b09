"""Masks whose survivors form shuffled blocks, as Regroup and DSB leave them: made to order for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fxsparse.coarsen import n_m
from tools.recipes import first_convolution, masked_layers


def shuffled_blocks(
    model: nn.Module, *, sparsity: float, seed: int, rows: int = 32, coupled: bool = True
) -> dict[str, Tensor]:
    """Groups of `rows` random rows, each with random columns of its own, `1 - sparsity` of all.

    coupled  layers of equal width share one partition of their rows into groups, so that of layers whose outputs are
             added none has to scatter its rows; otherwise every layer has its own
    The first convolution, depthwise convolutions and layers of fewer than 16 rows or columns stay dense, and so does
    the classifier of a convolutional network.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in _weights(model).items():
        own = torch.Generator().manual_seed(seed + len(weight)) if coupled else generator
        order = torch.randperm(len(weight), generator=own)
        masks[name] = block_mask(weight, order, sparsity, rows, generator)
    return masks


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """By parameter name; nn.MultiheadAttention holds its projection without a layer."""
    first = first_convolution(model)
    layers = {f"{n}.weight": m for n, m in masked_layers(model).items() if n != first and getattr(m, "groups", 1) == 1}
    found = {n: m.weight for n, m in layers.items() if min(m.weight.shape[0], m.weight[0].numel()) >= 16}
    return found | {n: p for n, p in model.named_parameters() if n.endswith("in_proj_weight")}


def block_mask(weight: Tensor, order: Tensor, sparsity: float, rows: int, generator: torch.Generator) -> Tensor:
    """Groups of `rows` rows in this order, each with random columns: bool in the weight's shape."""
    columns = weight[0].numel()
    kept = max(1, round(columns * (1 - sparsity)))
    mask = torch.zeros(weight.shape[0], columns, dtype=torch.bool)
    for group in order.split(rows):
        mask[group[:, None], torch.randperm(columns, generator=generator)[:kept]] = True
    return mask.view(weight.shape)


def two_four(model: nn.Module, *, sparsity: float, seed: int, rows: int = 32) -> dict[str, Tensor]:
    """2:4 by magnitude in linear layers and projections of as many columns; `sparsity` is a half, whatever is said."""
    weights = {name: weight.detach() for name, weight in _weights(model).items() if weight.dim() == 2}
    every = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return dict(n_m(weights, every).masks)


BLOCK_RECIPES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "shuffled_blocks": shuffled_blocks,
    "shuffled_blocks_apart": partial(shuffled_blocks, coupled=False),
    "two_four": two_four,
}
