"""The operator `fxsparse::semi_structured`: a linear layer with a 2:4 weight on CUDA, by cuSPARSELt as torch calls it.

    semi_structured(x, compressed, bias, rows) -> x @ w.T + bias

`compressed` is what torch._cslt_compress makes of the weight on this GPU: `gpu.for_gpu` puts the operator in the place
of `n_m` where a graph is lowered. x is [..., I]; tokens are filled up to a multiple of 8, as the library asks. While a
build is made the fastest of its algorithms is searched for (`semi_structured_search`), for the example's tokens.
Source: torch.sparse.SparseSemiStructuredTensorCUSPARSELT, without its tensor subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from fxsparse.formats.n_m import NM, unpack
from fxsparse.formats.operator import LIBRARY, TAGS
from fxsparse.formats.semi_structured_search import DEFAULT, search
from fxsparse.ir.graph import get_tensor, new_weight

LIBRARY.define("semi_structured(Tensor x, Tensor compressed, Tensor? bias, int rows) -> Tensor", tags=TAGS)
semi_structured = torch.ops.fxsparse.semi_structured.default
_SIZES = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
SEARCHING: ContextVar[bool] = ContextVar("searching", default=False)  # whether a build is being made
_DTYPES = (torch.float16, torch.bfloat16)


def why_not(weight: Tensor) -> str:
    """Why a 2:4 weight [O, I] on CUDA cannot be stored so; empty when it can."""
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "this GPU has no 2:4 product"
    if weight.dtype not in _DTYPES:
        return f"cuSPARSELt has no {str(weight.dtype).removeprefix('torch.')}"
    least = _SIZES[weight.dtype]
    rows, columns = least.sparse_min_rows, least.sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"cuSPARSELt wants multiples of {rows} x {columns}, the weight has shape {tuple(weight.shape)}"
    return ""


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Insert the operator before `node`, a call of `n_m` on CUDA."""
    x, values, codes, bias, shape, n, m = cast(Any, node.args)
    arrays = [get_tensor(gm, stored.target) for stored in (values, codes)]
    packed = NM(arrays[0].cpu(), arrays[1].cpu(), tuple(shape), n, m)
    compressed = torch._cslt_compress(unpack(packed).to(arrays[0].device))
    stored = new_weight(gm, node, f"{values.target.removesuffix('_values')}_compressed", compressed)
    with gm.graph.inserting_before(node):
        return gm.graph.call_function(semi_structured, (x, stored, bias, shape[0]))


def run(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The product alone, to time it."""
    compressed = torch._cslt_compress(weight.to(x.device))
    return lambda: cast(Tensor, semi_structured(x, compressed, None, weight.shape[0]))


def _cuda(x: Tensor, compressed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = flat.shape[0]
    if not tokens:
        return x.new_empty([*x.shape[:-1], rows])
    if short := -tokens % _SIZES[x.dtype].dense_min_cols:
        flat = F.pad(flat, (0, 0, 0, short))
    algorithm = _algorithm(compressed, flat)
    y = torch._cslt_sparse_mm(compressed, flat.t(), bias=bias, transpose_result=True, alg_id=algorithm)
    return y[:tokens].reshape([*x.shape[:-1], rows]).contiguous()


_FOUND: dict[tuple[Any, ...], int] = {}


def _algorithm(compressed: Tensor, x: Tensor) -> int:
    """The library's fastest for x [tokens, I] where it was, or is to be, searched; else its default."""
    key = (compressed.shape[0], x.shape[1], x.shape[0], x.dtype, x.device)
    if key not in _FOUND and SEARCHING.get() and not torch.cuda.is_current_stream_capturing():
        _FOUND[key] = search(*key)
    return _FOUND.get(key, DEFAULT)


def _fake(x: Tensor, compressed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], rows])


torch.library.register_fake("fxsparse::semi_structured", _fake, lib=LIBRARY)
LIBRARY.impl("semi_structured", _cuda, "CUDA")
