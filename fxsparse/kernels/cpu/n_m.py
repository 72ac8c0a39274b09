"""Calls `n_m.cpp` on tensors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fxsparse.kernels import build
from fxsparse.kernels.build import function, int64s

_NAMES = {torch.float32: "fxsparse_n_m_f32", torch.bfloat16: "fxsparse_n_m_bf16", torch.float64: "fxsparse_n_m_f64"}
DTYPES = tuple(_NAMES)
PATTERNS = ((1, 4), (2, 4))


def run(x: Tensor, y: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, isa: str | None = None) -> None:
    """Write y [..., O] for x [..., I], both contiguous and of one dtype with `values` and `bias`.

    values, codes  of a 1:4 or 2:4 weight as fxsparse.formats.n_m describes them, trusted
    Sums are float32 for bfloat16. float64 runs without vector instructions of our own.
    """
    columns, rows = x.shape[-1], y.shape[-1]
    sizes = (x.numel() // columns, rows, columns, values.shape[2], torch.get_num_threads())
    function("n_m", _NAMES[x.dtype], 6, isa)(
        int64s(sizes), x.data_ptr(), y.data_ptr(), values.data_ptr(), codes.data_ptr(),
        bias.data_ptr() if bias is not None else None,
    )  # fmt: skip


@functools.cache
def register_operator() -> None:
    """Give `fxsparse::n_m_into` its kernel for the CPU, called from C++ without Python in between."""
    build.register_operator("n_m", tuple(_NAMES.values()))
