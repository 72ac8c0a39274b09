"""What a coarsening gives back: new masks, the row groups they consist of, and per layer what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import Tensor

from fxsparse.ir.masks import Masks

HEADER = ("weight", "rows kept", "groups", "density", "after", "|w| kept", "w^2 kept", "added", "removed")


@dataclass(frozen=True)
class RowGroup:
    """Rows that share one list of kept columns; the block is dense inside.

    rows     int64, ascending, indices of output channels
    columns  int64, ascending, indices into the weight viewed as [O, I * kH * kW]
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Layer:
    """What a coarsening did to one weight.

    rows, rows_kept  output channels, and how many of them keep at least one weight
    groups           row groups with at least one column
    density_*        fraction of the weights kept
    l1_kept          share of the sum of |w| over the weights the given mask keeps that is still kept, 0 to 1
    l2_kept          the same of the sum of w^2
    added, removed   mask entries that changed: False to True, True to False
    fallback         why the layer, or some of its rows, was not coarsened by the rule asked for; "" when it was
    """

    name: str
    rows: int
    rows_kept: int
    density_before: float
    density_after: float
    l1_kept: float
    l2_kept: float
    added: int
    removed: int
    groups: int = 1
    fallback: str = ""


@dataclass(frozen=True)
class Coarsened:
    """The new masks and, per layer, what changed. `str()` is a table.

    groups  parameter name -> the row groups of its mask; () where the mask was passed on as it was
    """

    masks: Masks
    layers: tuple[Layer, ...]
    groups: Mapping[str, tuple[RowGroup, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([str(tabulate([cells(layer) for layer in self.layers], HEADER, disable_numparse=True)),
                          *(f"{layer.name}: {layer.fallback}" for layer in self.layers if layer.fallback)])  # fmt: skip


def describe(
    name: str, weight: Tensor, mask: Tensor, coarse: Tensor, groups: Sequence[RowGroup], fallback: str = ""
) -> Layer:
    """The row of one weight. All tensors have the weight's shape; `groups` are the row groups of `coarse`."""
    both = mask & coarse
    return Layer(
        name=name,
        rows=mask.shape[0],
        rows_kept=int(coarse.flatten(1).any(1).sum()),
        density_before=int(mask.sum()) / mask.numel(),
        density_after=int(coarse.sum()) / mask.numel(),
        l1_kept=_share(weight.abs(), both, mask),
        l2_kept=_share(weight.double().square(), both, mask),
        added=int((coarse & ~mask).sum()),
        removed=int((mask & ~coarse).sum()),
        groups=sum(len(group.columns) > 0 for group in groups),
        fallback=fallback,
    )


def union(groups: Sequence[RowGroup], like: Tensor) -> Tensor:
    """The mask of `like`'s shape [O, ...] that keeps every row group's block and nothing else."""
    coarse = torch.zeros(like.shape[0], like[0].numel(), dtype=torch.bool)
    for group in groups:
        coarse[group.rows[:, None], group.columns] = True
    return coarse.view(like.shape).to(like.device)


def _share(values: Tensor, part: Tensor, whole: Tensor) -> float:
    """Sum over `part` divided by the sum over `whole`; 1.0 when there was nothing to lose."""
    total = float((values * whole).sum(dtype=torch.float64))
    return float((values * part).sum(dtype=torch.float64)) / total if total else 1.0


def cells(layer: Layer) -> tuple[str, ...]:
    """A line of the table under `HEADER`."""
    return (
        layer.name,
        f"{layer.rows_kept} of {layer.rows}",
        str(layer.groups),
        f"{layer.density_before:.3f}",
        f"{layer.density_after:.3f}",
        f"{layer.l1_kept:.1%}",
        f"{layer.l2_kept:.1%}",
        str(layer.added),
        str(layer.removed),
    )
