"""Sparse checkpoints of compressed-tensors (llm-compressor) and SparseML, formats sparse-24-bitmask and sparse-bitmask.

    NAME.compressed   kept values, row after row: [O, I / 2] for 2:4, [kept] otherwise
    NAME.bitmask      uint8 [O, ceil(I / 8)], bit j of byte b is column 8 b + j, 1 = kept
    NAME.shape        O, I
    NAME.row_offsets  where every row begins in `compressed`; sparse-bitmask only

NAME is the parameter's without ".weight" (compressed-tensors) or with it (SparseML). Quantized values are given as they
are stored, with their scales beside them. Source: compressed-tensors 0.9, sparse_compressors (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fxsparse.errors import MaskError
from fxsparse.ir.masks import Masks
from fxsparse.readers.checkpoint import Checkpoint
from fxsparse.readers.files import are_tensors

NAME = "compressed-tensors"
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def recognizes(found: Mapping[str, object]) -> bool:
    """Whether there is a bitmask, or a weight that is packed otherwise."""
    return are_tensors(found) and any(key.endswith((".bitmask", ".weight_packed")) for key in found)


def read(found: Mapping[str, Tensor], where: str) -> Checkpoint:
    """Masks, and all tensors with the compressed ones dense again. Raises MaskError on packing of another kind."""
    packed = next((key for key in found if key.endswith(".weight_packed")), None)
    if packed is not None:
        raise MaskError(f"{where}, {packed!r}", expected="weights stored as sparse-24-bitmask or sparse-bitmask",
                        got="quantized weights packed into integers",
                        do="Decompress the checkpoint with compressed-tensors first.")  # fmt: skip
    prefixes = [key.removesuffix(".bitmask") for key in found if key.endswith(".bitmask")]
    parts = {f"{prefix}.{part}" for prefix in prefixes for part in _PARTS}
    masks, weights = {}, {key: tensor for key, tensor in found.items() if key not in parts}
    for prefix in prefixes:
        name = prefix if prefix.endswith(".weight") else f"{prefix}.weight"
        masks[name], weights[name] = _decompressed(prefix, found, where)
    return Checkpoint(NAME, Masks(masks), weights)


def _decompressed(prefix: str, found: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """Mask and weight."""
    missing = [part for part in _PARTS[:3] if f"{prefix}.{part}" not in found]
    values, bits, shape = (found.get(f"{prefix}.{part}") for part in _PARTS[:3])
    if values is None or bits is None or shape is None:
        raise _damaged(where, prefix, f"no {' and no '.join(missing)}")
    sizes = [int(size) for size in shape.flatten()]
    if not sizes or min(sizes) < 1 or math.prod(sizes) > 8 * bits.numel() or bits.dtype != torch.uint8:
        raise _damaged(where, prefix, f"shape {sizes} and a bitmask of {bits.numel()} {bits.dtype}")
    if list(bits.shape) != [*sizes[:-1], -(-sizes[-1] // 8)]:
        raise _damaged(where, prefix, f"shape {sizes} and a bitmask of shape {list(bits.shape)}")
    kept = np.unpackbits(bits.contiguous().numpy(), axis=-1, count=sizes[-1], bitorder="little")
    mask = torch.from_numpy(kept.astype(bool))
    if int(mask.sum()) != values.numel():
        raise _damaged(where, prefix, f"{values.numel()} values for a bitmask with {int(mask.sum())}")
    _check_offsets(prefix, found, mask, where)
    weight = torch.zeros(sizes, dtype=values.dtype)
    whole = _INTEGER[values.element_size()]  # float8 tensors cannot be indexed
    weight.view(whole)[mask] = values.contiguous().view(whole).flatten()
    return mask, weight


def _check_offsets(prefix: str, found: Mapping[str, Tensor], mask: Tensor, where: str) -> None:
    offsets = found.get(f"{prefix}.row_offsets")
    counts = mask.flatten(0, -2).sum(1) if mask.dim() > 1 else mask.sum()[None]
    if offsets is not None and not torch.equal(offsets.flatten().long(), counts.cumsum(0) - counts):
        raise _damaged(where, prefix, "row_offsets that are not those of the bitmask")


def _damaged(where: str, prefix: str, got: str) -> MaskError:
    return MaskError(f"{where}, {prefix!r}", expected="values, bitmask and shape that fit each other", got=got,
                     do="The file is damaged or incomplete: get it again, all of its parts.")  # fmt: skip
