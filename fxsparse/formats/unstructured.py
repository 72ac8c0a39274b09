"""Unstructured zeros: groups of few rows, down to one each, multiplied with pixels in vector lanes.

The arrays and the operator are those of shuffled blocks with `lanes="pixels"`; groups of one row are compressed sparse
rows. Rows share a group where reading pixels once for all of them is worth more than multiplying the zeros in it.
Sources: Park et al., Faster CNNs with Direct Sparse Convolutions (ICLR 2017); Elsen et al., Fast Sparse ConvNets (CVPR
2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from fxsparse.formats.shuffled_block import ShuffledBlock, pack
from fxsparse.formats.shuffled_block_op import ShuffledBlockFormat


class UnstructuredFormat(ShuffledBlockFormat):
    """conv2d without groups, and linear, in float32 and bfloat16, on a CPU."""

    name = "unstructured"
    writes_anywhere = True  # results go through planes, one for each row

    def why_not(self, node: fx.Node, weight: Tensor) -> str:
        if weight.device.type != "cpu":
            return "single rows have a kernel for CPUs only"
        return super().why_not(node, weight)

    def why_not_standard(self, node: fx.Node, weight: Tensor) -> str:
        return "standard operators have no use for zeros that rows do not share"

    def pack(self, weight: Tensor, groups: Sequence[NDArray[np.int64]] | None = None) -> ShuffledBlock:
        return pack(weight, groups, lanes="pixels")
