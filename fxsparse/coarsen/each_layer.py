"""One rule, applied to every weight that has a mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxsparse.coarsen.given import layers_of
from fxsparse.coarsen.report import Coarsened, RowGroup, describe, union
from fxsparse.ir.masks import Masks

# name, weight and mask -> the row groups, None to pass the mask on as it is, and the reason when the rule did not apply
Rule = Callable[[str, Tensor, Tensor], tuple[tuple[RowGroup, ...] | None, str]]
_log = logging.getLogger("fxsparse")


def each_layer(weights: Mapping[str, Tensor], masks: Masks, rule: Rule) -> Coarsened:
    """The masks and report of `rule`. Masks of fewer than two dimensions are passed on and not in the report.

    Raises MaskError on a mask that fits no weight, InputError on weights that are NaN or infinite.
    """
    found: dict[str, Tensor] = dict(masks)
    layers, groups = [], {}
    for name, weight, mask in layers_of(weights, masks):
        _log.info("coarsen %s", name)
        with torch.device("cpu"):  # whatever the caller's default is
            made, fallback = rule(name, weight, mask)
            found[name], groups[name] = (mask, ()) if made is None else (union(made, mask), made)
        layers.append(describe(name, weight, mask, found[name], groups[name], fallback))
    return Coarsened(Masks(found), tuple(layers), groups)


def where_columns_are_shared(rule: Rule) -> Rule:
    """The rule, except for depthwise convolutions: there every row has an input channel of its own."""

    def narrowed(name: str, weight: Tensor, mask: Tensor) -> tuple[tuple[RowGroup, ...] | None, str]:
        if mask.dim() > 2 and mask.shape[1] == 1:
            return None, "kept as it was: one input channel per row, as in a depthwise convolution"
        return rule(name, weight, mask)

    return narrowed
