"""The operator `fxsparse::semi_structured`: a linear layer with a 2:4 weight on CUDA, by cuSPARSELt as torch calls it.

    semi_structured(x, compressed, bias, rows) -> x @ w.T + bias

`compressed` is what torch._cslt_compress makes of the weight. x is [..., I]; tokens are filled up to a multiple of 8,
as the library asks. Of the library's algorithms the fastest is searched at the first call with so many tokens: on an
H200 that is up to 2.8 times as fast as its default.
Source: torch.sparse.SparseSemiStructuredTensorCUSPARSELT, without its tensor subclass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from fxsparse.formats.operator import LIBRARY, TAGS
from fxsparse.ir.graph import arg, aten, new_weight

LIBRARY.define("semi_structured(Tensor x, Tensor compressed, Tensor? bias, int rows) -> Tensor", tags=TAGS)
semi_structured = torch.ops.fxsparse.semi_structured.default
_SIZES = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
log = logging.getLogger("fxsparse")
_DTYPES = (torch.float16, torch.bfloat16)


def why_not(weight: Tensor) -> str:
    """Why a 2:4 weight [O, I] on CUDA cannot be stored so; empty when it can."""
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    if weight.dtype not in _DTYPES:
        return f"cuSPARSELt has no {str(weight.dtype).removeprefix('torch.')}"
    least = _SIZES[weight.dtype]
    rows, columns = least.sparse_min_rows, least.sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"cuSPARSELt wants multiples of {rows} x {columns}, the weight has shape {tuple(weight.shape)}"
    return ""


def lower(gm: fx.GraphModule, node: fx.Node, weight: Tensor) -> fx.Node:
    """Insert the operator before the linear `node`. `weight` is 2:4, on CUDA."""
    name = cast(fx.Node, node.args[1]).target
    stored = new_weight(gm, node, f"{name}_compressed", torch._cslt_compress(weight))
    call: Any = gm.graph.call_function
    with gm.graph.inserting_before(node):
        x = call(aten.contiguous.default, (node.args[0],))
        return cast(fx.Node, call(semi_structured, (x, stored, arg(node, "bias"), weight.shape[0])))


def run(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The product alone, to time it."""
    compressed = torch._cslt_compress(weight.to(x.device))
    return lambda: cast(Tensor, semi_structured(x, compressed, None, weight.shape[0]))


def _cuda(x: Tensor, compressed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    if not tokens:
        return x.new_empty([*x.shape[:-1], rows])
    flat = F.pad(flat, (0, 0, 0, -tokens % _SIZES[x.dtype].dense_min_cols))
    how: dict[str, Any] = _algorithm(compressed, flat.t(), bias)
    y = torch._cslt_sparse_mm(compressed, flat.t(), bias=bias, transpose_result=True, **how)
    return y[:tokens].reshape([*x.shape[:-1], rows]).contiguous()


_FOUND: dict[tuple[Any, ...], dict[str, int]] = {}


def _algorithm(compressed: Tensor, x: Tensor, bias: Tensor | None) -> dict[str, int]:
    """The library's fastest for these shapes; its default where that cannot be had.

    Inside a CUDA graph nothing can be timed, and what is found without a bias need not take one.
    """
    key = (compressed.shape, x.shape, x.dtype, bias is None, x.device)
    if key not in _FOUND:
        if torch.cuda.is_current_stream_capturing():
            return {}
        search: Any = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
        try:
            found = {"alg_id": search(compressed, x, None, None, None, True)[0]}
            torch._cslt_sparse_mm(compressed, x, bias=bias, transpose_result=True, **cast(Any, found))
        except RuntimeError as error:
            log.debug("2:4 product of %s and %s: %s", compressed.shape, x.shape, error)
            found = {}
        _FOUND[key] = found
    return _FOUND[key]


def _fake(x: Tensor, compressed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], rows])


torch.library.register_fake("fxsparse::semi_structured", _fake, lib=LIBRARY)
LIBRARY.impl("semi_structured", _cuda, "CUDA")
