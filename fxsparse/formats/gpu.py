"""Packed layers as they run best on a GPU.

Graphs keep the operators of the formats, which run anywhere and can be saved; what is made for this GPU is put in where
a graph is lowered.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from fxsparse.formats import semi_structured, shuffled_block_gpu
from fxsparse.formats.n_m_op import n_m
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.formats.turned import settle
from fxsparse.ir.graph import arg, call_nodes, erase_unused, flat, on_gpu


def placed(gm: fx.GraphModule) -> fx.GraphModule:
    """A flat clone of `gm` as it runs where its weights are."""
    return for_gpu(flat(gm)) if on_gpu(gm) else flat(gm)


def for_gpu(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with its packed linear layers replaced, in place."""
    lowered = {shuffled_block: shuffled_block_gpu.lower}
    if torch.backends.cusparselt.is_available():
        lowered[n_m] = semi_structured.lower
    for node in call_nodes(gm, *lowered):
        if len(cast(Any, arg(node, "shape"))) == 2:
            node.replace_all_uses_with(lowered[cast(Any, node.target)](gm, node))
            gm.graph.erase_node(node)
    erase_unused(gm)  # users that are none would be turned for
    settle(gm)
    erase_unused(gm)
    return gm
