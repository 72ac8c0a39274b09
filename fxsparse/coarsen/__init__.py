"""From masks to masks that hardware likes. These change the function: fine-tune afterwards."""

from __future__ import annotations

from fxsparse.coarsen.refill import Coarsened, Layer, refill
from fxsparse.coarsen.with_batch_norm import with_batch_norm

__all__ = ["Coarsened", "Layer", "refill", "with_batch_norm"]
