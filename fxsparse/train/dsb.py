"""Dynamic shuffled blocks: masks that change as in RigL, and after every change are shuffled blocks again.

candidates   the floor(f(t) k) smallest |w| of a layer's k weights
dropped      candidates whose row or column, inside their block of B x B, is candidates to half or more: what is dropped
             alone would come back with the next blocks
grown        as many others, of largest |dL/dw|
then         `coarsen.shuffled_block` with the density from the start; every weight that was not there before is 0
Source: Dynamic Shuffled-Block training (NeurIPS 2022) and its released code, which grows by the dense gradient and not
by the paper's estimate of it. There new weights keep what they held and the optimizer its momentum; a layer whose sides
B does not divide is never blocked.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fxsparse.coarsen.report import RowGroup
from fxsparse.coarsen.shuffled_block import magnitudes, shuffled_block
from fxsparse.ir.masks import Masks
from fxsparse.prune.largest import largest
from fxsparse.train.masked import Training, Weight, hooked, parameters_of
from fxsparse.train.rigl import DynamicMask, Schedule


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

    def weights() -> list[Weight]:
        given = Masks(masks).check(model)
        found = shuffled_block(dict(model.named_parameters()), given, block=block, q=q)
        return [
            _Blocks(name, parameter, given[name], schedule, block, q)
            if found.groups.get(name)
            else DynamicMask(name, parameter, mask, schedule)
            for name, parameter, mask in parameters_of(model, found.masks)
        ]

    return hooked(model, weights)


class _Blocks(DynamicMask):
    """A weight of shuffled blocks, [O, ...] viewed as [O, n].

    numbers  int32 [O, n]: which block each weight lies in, -1 outside
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, mask: Tensor, schedule: Schedule, block: int, q: float | None
    ) -> None:
        self.name, self.block, self.q, self.density = name, block, q, float(mask.double().mean())
        super().__init__(name, parameter, self._blocked(parameter.detach(), mask), schedule)

    def drop_and_grow(self, weight: Tensor, score: Tensor) -> Tensor:
        count = int(self.schedule.fraction(self.steps) * int(self.mask.sum()))
        candidates = largest(-weight.abs().masked_fill(~self.mask, torch.inf), count)
        dropped = block_aware(candidates.flatten(1), self.numbers.to(candidates.device)).view(candidates.shape)
        stays = self.mask & ~dropped
        grown = largest(score.masked_fill(stays, -1), int(dropped.sum()))
        return self._blocked(torch.where(stays, weight, 0), stays | grown)

    def _blocked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The mask of the best blocks, whose numbers are kept."""
        found = shuffled_block({self.name: weight}, {self.name: mask}, block=self.block, q=self.q, density=self.density)
        self.numbers = numbered(found.groups[self.name], magnitudes(weight, mask), self.block)
        return found.masks[self.name]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"numbers": self.numbers}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.numbers = state["numbers"].cpu()


def numbered(groups: tuple[RowGroup, ...], magnitude: Tensor, block: int) -> Tensor:
    """Each weight's block [O, n], as `shuffled_block` cut them: a group's columns by falling norm. -1 outside."""
    numbers, count = torch.full(magnitude.shape, -1, dtype=torch.int32), 0
    for group in groups:
        norms = magnitude[group.rows][:, group.columns].square().sum(0)
        order = group.columns[norms.argsort(descending=True, stable=True)]
        numbers[group.rows[:, None], order] = (count + torch.arange(len(order)) // block).int()
        count += -(-len(order) // block)
    return numbers


def block_aware(candidates: Tensor, numbers: Tensor) -> Tensor:
    """The candidates that make up half or more of their row or their column of a block. All [O, n]."""
    rows, columns = candidates.shape
    inside = numbers >= 0
    dropped = torch.zeros_like(candidates)
    for lines, line in ((rows, torch.arange(rows)[:, None]), (columns, torch.arange(columns)[None])):
        key = (numbers.long() * lines + line.to(numbers.device))[inside]
        chosen, all_of_it = key[candidates[inside]].bincount(minlength=1), key.bincount()
        chosen = torch.nn.functional.pad(chosen, (0, len(all_of_it) - len(chosen)))
        dropped[inside] |= 2 * chosen[key] >= all_of_it[key]
    return dropped & candidates
