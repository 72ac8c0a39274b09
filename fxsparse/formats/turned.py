"""The operator `fxsparse::turned`: features from last to first, for packed layers on a GPU, or back."""

from __future__ import annotations

import torch
from torch import Tensor

from fxsparse.formats.operator import LIBRARY, TAGS
from fxsparse.kernels.triton import turned as kernel

LIBRARY.define("turned(Tensor x, bool features_first) -> Tensor", tags=TAGS)
turned = torch.ops.fxsparse.turned.default


def reference(x: Tensor, features_first: bool) -> Tensor:
    """Features of x [..., I] first, or of [O, ...] last; on any device and in any dtype."""
    y = x.movedim(-1, 0) if features_first else x.movedim(0, -1)
    return y.clone(memory_format=torch.contiguous_format)


def _cuda(x: Tensor, features_first: bool) -> Tensor:
    if features_first:
        flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
        return kernel(flat).view(x.shape[-1], *x.shape[:-1])
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    return kernel(flat).view(*x.shape[1:], x.shape[0])


def _fake(x: Tensor, features_first: bool) -> Tensor:
    return x.new_empty([x.shape[-1], *x.shape[:-1]] if features_first else [*x.shape[1:], x.shape[0]])


torch.library.register_fake("fxsparse::turned", _fake, lib=LIBRARY)
LIBRARY.impl("turned", reference, "CompositeExplicitAutograd")
LIBRARY.impl("turned", _cuda, "CUDA")
