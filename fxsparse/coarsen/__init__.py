"""From masks to masks that hardware likes. These change the function: fine-tune afterwards."""

from __future__ import annotations

from fxsparse.coarsen.channel_features import channel_features
from fxsparse.coarsen.cost import Cost
from fxsparse.coarsen.coupled import coupled_weights
from fxsparse.coarsen.n_m import n_m
from fxsparse.coarsen.partition import partition
from fxsparse.coarsen.refill import refill, refill_plus
from fxsparse.coarsen.regroup import regroup
from fxsparse.coarsen.report import Coarsened, Layer, RowGroup
from fxsparse.coarsen.shuffled_block import shuffled_block
from fxsparse.coarsen.with_batch_norm import with_batch_norm

__all__ = [
    "Coarsened",
    "Cost",
    "Layer",
    "RowGroup",
    "channel_features",
    "coupled_weights",
    "n_m",
    "partition",
    "refill",
    "refill_plus",
    "regroup",
    "shuffled_block",
    "with_batch_norm",
]
