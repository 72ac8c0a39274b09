"""A mask as a picture: its densities as pixels, and those as a PNG in a data URI."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

PIXELS = 160  # the longest side of a picture
_KEPT = (37, 106, 210)
_REMOVED = (226, 106, 46)


def picture(mask: Tensor, kept_rows: Sequence[int] | None = None, kept_columns: Sequence[int] | None = None) -> Tensor:
    """Paint a mask: blue where weights are kept, orange over removed rows and columns, clear elsewhere.

    mask       [O, I, ...], bool, True = kept; a pixel is the density over the axes after the second
    kept_*     indices that stay; None paints nothing as removed
    Returns [h, w, 4] uint8 RGBA, h = O and w = I, or means over equal blocks when they exceed 160.
    """
    gone_rows, gone_columns = (_gone(kept, n) for kept, n in zip((kept_rows, kept_columns), mask.shape, strict=False))
    down, across = (-(-n // PIXELS) for n in mask.shape[:2])
    bands = zip(
        torch.split(mask.detach().cpu(), down), torch.split(gone_rows, down), strict=True
    )  # by band: a mask can be large
    maps = [_block_means(band, rows, gone_columns, across) for band, rows in bands]
    kept, lost, gone = torch.cat(maps, dim=1)
    blue, orange = kept.sqrt(), 0.3 * gone + 0.6 * lost.sqrt()  # the root keeps a density of 0.1 visible
    alpha = (blue + orange).clamp(max=1)
    share = (blue / (blue + orange).clamp(min=1e-9))[..., None]
    color = share * share.new_tensor(_KEPT) + (1 - share) * share.new_tensor(_REMOVED)
    levels = (alpha * 32).round() / 32  # few levels compress well
    return torch.cat([color, 255 * levels[..., None]], dim=2).round().to(torch.uint8)


def _gone(kept: Sequence[int] | None, n: int) -> Tensor:
    # A grouped convolution may number its columns by input channel, which its weight does not.
    if kept is None or any(i >= n for i in kept):
        return torch.zeros(n, dtype=torch.bool, device="cpu")
    gone = torch.ones(n, dtype=torch.bool, device="cpu")
    gone[list(kept)] = False
    return gone


def _block_means(band: Tensor, gone_rows: Tensor, gone_columns: Tensor, across: int) -> Tensor:
    """One row of pixels [3, 1, w] from rows of a mask: density that stays, density that is removed, share removed."""
    density = band.float().flatten(2).mean(2) if band.dim() > 2 else band.float()
    chosen = torch.stack([~gone_rows, gone_rows]).float() / len(gone_rows)
    stays, goes = chosen @ density
    share = torch.where(gone_columns, 1.0, chosen[1].sum())
    maps = torch.stack([stays * ~gone_columns, stays * gone_columns + goes, share])[:, None]
    return torch.nn.functional.avg_pool1d(maps, across, ceil_mode=True)  # the last block may be narrower


def data_uri(pixels: Tensor) -> str:
    """The PNG of [h, w, 4] uint8 RGBA, for the src of an <img>."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def png(pixels: Tensor) -> bytes:
    """Encode [h, w, 4] uint8 RGBA as a PNG: https://www.w3.org/TR/png-3/."""
    height, width = pixels.shape[:2]
    lines = torch.cat([pixels.new_zeros(height, 1), pixels.flatten(1)], dim=1)  # filter type 0 first
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits, RGBA
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
