"""Masks whose survivors form shuffled blocks, as Regroup and DSB leave them: made to order for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tools.recipes import coupled_channels, first_convolution, masked_layers, separate_channels


def shuffled_blocks(
    model: nn.Module, *, sparsity: float, seed: int, rows: int = 32, coupled: bool = True
) -> dict[str, Tensor]:
    """Groups of `rows` random rows, each with random columns of its own, `1 - sparsity` of all.

    coupled  layers whose outputs are added share one partition of their channels into groups, so that no layer has to
             scatter its rows (in a model that torch.fx cannot trace, layers of equal width share one); otherwise every
             layer has its own
    The first convolution, depthwise convolutions and layers of fewer than 16 rows or columns stay dense, and so does
    the classifier of a convolutional network.
    """
    generator = torch.Generator().manual_seed(seed)
    numbering = coupled_channels(model) if coupled else separate_channels(model)
    numbering_is_separate = all(torch.equal(numbering[n], c) for n, c in separate_channels(model).items())
    first, weights = first_convolution(model), masked_layers(model)
    highest = max(int(channels.max()) for channels in numbering.values()) + 1
    place = torch.randperm(highest, generator=generator)  # sorting by it shuffles, alike in all layers of a space
    masks = {}
    for name, layer in weights.items():
        grouped = getattr(layer, "groups", 1) != 1
        if name != first and not grouped and min(layer.weight.shape[0], layer.weight[0].numel()) >= 16:
            shared = coupled and numbering_is_separate
            order = _order(len(layer.weight), seed) if shared else place[numbering[name]].argsort()
            masks[f"{name}.weight"] = _blocks(layer.weight, order, sparsity, rows, generator)
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj_weight"):  # nn.MultiheadAttention holds it without a layer
            order = torch.randperm(len(parameter), generator=generator)
            masks[name] = _blocks(parameter, order, sparsity, rows, generator)
    return masks


def _order(rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + rows))


def _blocks(weight: Tensor, order: Tensor, sparsity: float, rows: int, generator: torch.Generator) -> Tensor:
    columns = weight[0].numel()
    kept = max(1, round(columns * (1 - sparsity)))
    mask = torch.zeros(weight.shape[0], columns, dtype=torch.bool)
    for group in order.split(rows):
        mask[group[:, None], torch.randperm(columns, generator=generator)[:kept]] = True
    return mask.view(weight.shape)


BLOCK_RECIPES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "shuffled_blocks": shuffled_blocks,
    "shuffled_blocks_apart": partial(shuffled_blocks, coupled=False),
}
