"""Dynamic shuffled blocks: masks that change as in RigL, and after every change are shuffled blocks again.

candidates   the floor(f(t) k) smallest |w| of a layer's k weights
dropped      candidates whose row or column, inside their block of B x B, has B / 2 candidates or more: what is dropped
             alone would come back with the next blocks
grown        as many others, of largest |dL/dw|
then         `coarsen.shuffled_block` with the density from the start; every weight that was not there before is 0
Source: Dynamic Shuffled-Block training (NeurIPS 2022) and its released code, which grows by the dense gradient. There
new weights keep what they held and the optimizer its momentum; a layer whose sides B does not divide is never blocked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fxsparse.coarsen.shuffled_block import shuffled_block
from fxsparse.ir.masks import Masks
from fxsparse.prune.largest import largest
from fxsparse.train.masked import Training, Weight, parameters_of, training
from fxsparse.train.rigl import Moving, Schedule


def dsb(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    steps: int,
    block: int = 16,
    q: float | None = None,
    every: int = 100,
    alpha: float = 0.3,
    until: float = 0.75,
) -> AbstractContextManager[Training]:
    """Inside, `model` is trained under shuffled blocks that change, from those of `masks` on.

    block, q  rows and columns of a block, and which rows are put together: see `fxsparse.coarsen.shuffled_block`

    The rest as in `rigl`. What has no blocks (depthwise convolutions, vectors) changes as in `rigl`. Densities are
    those of the given masks, exceeded by less than a block. Raises what `rigl` and `shuffled_block` do.
    """
    schedule = Schedule(steps, every, alpha, until)
    blocked = shuffled_block(dict(model.named_parameters()), Masks(masks).check(model), block=block, q=q)
    densities = {name: float(mask.double().mean()) for name, mask in Masks(masks).items()}
    weights: dict[str, Weight] = {}
    for name, parameter, mask in parameters_of(model, blocked.masks):
        if blocked.groups.get(name):
            weights[name] = _Blocks(parameter, mask, schedule, block, q, densities[name])
        else:
            weights[name] = Moving(parameter, mask, schedule)
    return training(weights)


class _Blocks(Moving):
    """A weight of shuffled blocks, [O, ...] viewed as [O, n]."""

    def __init__(
        self, parameter: nn.Parameter, mask: Tensor, schedule: Schedule, block: int, q: float | None, density: float
    ) -> None:
        super().__init__(parameter, mask, schedule)
        self.block, self.q, self.density = block, q, density

    def changed(self, weight: Tensor, promise: Tensor) -> Tensor:
        kept = int(self.mask.sum())
        count = int(self.schedule.share(self.steps) * kept)
        candidates = largest(-weight.abs().masked_fill(~self.mask, torch.inf), count)
        dropped = gathered(candidates, self.mask, weight, self.block)
        stays = self.mask & ~dropped
        grown = largest(promise.masked_fill(stays, -1), int(dropped.sum()))
        one = {"weight": torch.where(stays, weight, 0)}
        found = shuffled_block(one, {"weight": stays | grown}, block=self.block, q=self.q, density=self.density)
        return found.masks["weight"]


def gathered(candidates: Tensor, mask: Tensor, weight: Tensor, block: int) -> Tensor:
    """The candidates that share a row or a column of their block with half of it or more. All of one shape."""
    chosen = candidates.flatten(1)
    dropped = torch.zeros_like(chosen)
    for rows, columns in blocks(mask.flatten(1), weight.flatten(1), block):
        inside = chosen[rows[:, None], columns]
        many = [inside.sum(dim, keepdim=True) >= block / 2 for dim in (0, 1)]
        dropped[rows[:, None], columns] = inside & (many[0] | many[1])
    return dropped.view(candidates.shape)


def blocks(mask: Tensor, weight: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of every block: rows whose columns are the same, these by falling norm, as they were cut."""
    _, group = mask.unique(dim=0, return_inverse=True)
    for g in range(int(group.max()) + 1):
        for rows in (group == g).nonzero().flatten().split(block):
            columns = mask[rows[0]].nonzero().flatten()
            norms = weight[rows][:, columns].square().sum(0)
            for some in columns[norms.argsort(descending=True, stable=True)].split(block):
                yield rows, some
