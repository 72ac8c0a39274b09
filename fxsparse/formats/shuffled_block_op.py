"""The operator `fxsparse::shuffled_block`: convolution and matrix product with a packed weight, channels last.

    shuffled_block(x, values, value_ptr, columns, column_ptr, rows, row_ptr, bias, residual,
                   out_channels, kernel, stride, padding, dilation, activation) -> act(x * w + bias + residual)

x is [N, H, W, I] and the result [N, OH, OW, O]; with a 1x1 kernel, stride 1 and no padding x may be [..., I]. float32
and bfloat16 on a CPU run the C++ kernel, on CUDA the Triton kernel; anything else unpacks the weight and runs dense.
It has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.formats.shuffled_block import KERNEL_DTYPES, ShuffledBlock, unpack
from fxsparse.kernels.cpu.shuffled_block import run as run_on_cpu
from fxsparse.kernels.triton import DTYPES as TRITON_DTYPES
from fxsparse.kernels.triton import shuffled_block_conv2d, shuffled_block_linear

Pair = Sequence[int]
_ACTIVATION = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}

_library = torch.library.Library("fxsparse", "FRAGMENT")
_library.define(
    "shuffled_block(Tensor x, Tensor values, Tensor value_ptr, Tensor columns, Tensor column_ptr, Tensor rows,"
    " Tensor row_ptr, Tensor? bias, Tensor? residual, int out_channels, int[2] kernel, int[2] stride, int[2] padding,"
    " int[2] dilation, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
shuffled_block = torch.ops.fxsparse.shuffled_block.default


def multiply(
    packed: ShuffledBlock,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    activation: str = "none",
) -> Tensor:
    """`act(x * w + bias + residual)` [N, OH, OW, O] for x [N, H, W, I]; [..., O] for [..., I] and a linear weight."""
    arguments = (packed.shape[0], packed.kernel, list(stride), list(padding), list(dilation), activation)
    return cast(Tensor, shuffled_block(x, *packed.tensors, bias, residual, *arguments))


def _shape(x: Tensor, out_channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> list[Any]:
    if pointwise(kernel, stride, padding):
        return [*x.shape[:-1], out_channels]
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[1:3], kernel, stride, padding, dilation, strict=True)
    ]
    return [x.shape[0], *sizes, out_channels]


def pointwise(kernel: Pair, stride: Pair, padding: Pair) -> bool:
    """Whether every output pixel reads its own input pixel only: then x may have any number of dimensions."""
    return tuple(kernel) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    out_channels, kernel, stride, padding, dilation, _ = arguments[8:]
    return x.new_empty(_shape(x, out_channels, kernel, stride, padding, dilation))


def _cpu(x: Tensor, *arguments: Any) -> Tensor:
    packed, bias, residual = arguments[:6], arguments[6], arguments[7]
    out_channels, kernel, stride, padding, dilation, activation = arguments[8:]
    if x.dtype not in KERNEL_DTYPES or not x.numel():
        return reference(x, *arguments)
    y = x.new_empty(_shape(x, out_channels, kernel, stride, padding, dilation))
    if len(packed[4]) < out_channels:
        y.copy_(_epilogue(torch.zeros_like(y), bias, residual, activation))
    x4, y4 = (t if t.dim() == 4 else t.view(1, 1, -1, t.shape[-1]) for t in (x.contiguous(), y))
    values = packed[0] if packed[0].dtype == torch.float32 else packed[0].float()
    extra = [t if t is None else t.contiguous() for t in (bias, residual)]
    run_on_cpu(x4, y4, (values, *packed[1:]), extra[0], extra[1], (kernel, stride, padding, dilation), activation)
    return y


def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    """The Triton kernel. Not run on a GPU yet: see fxsparse.kernels.triton."""
    (values, value_ptr, columns, column_ptr, rows, row_ptr), bias, residual = arguments[:6], arguments[6], arguments[7]
    out_channels, kernel, stride, padding, dilation, activation = arguments[8:]
    if x.dtype not in TRITON_DTYPES or not x.numel():
        return reference(x, *arguments)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    packed = (rows, row_ptr, columns, column_ptr, values.to(x.dtype), value_ptr)
    if pointwise(kernel, stride, padding):
        return shuffled_block_linear(x, *packed, bias, residual, activation, out_features=out_channels)
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    geometry: Any = {name: tuple(pair) for name, pair in pairs.items()}
    return shuffled_block_conv2d(x, *packed, bias, residual, activation, out_channels=out_channels, **geometry)


def reference(x: Tensor, *arguments: Any) -> Tensor:
    """The same in PyTorch's own operators, on any device and in any dtype."""
    packed, bias, residual = arguments[:6], arguments[6], arguments[7]
    out_channels, kernel, stride, padding, dilation, activation = arguments[8:]
    shape = (out_channels, x.shape[-1], *kernel)
    values, value_ptr, columns, column_ptr, rows, row_ptr = (t.cpu() for t in packed)
    weight = unpack(ShuffledBlock(values, value_ptr, columns, column_ptr, rows, row_ptr, shape)).to(x)
    if pointwise(kernel, stride, padding):
        y = F.linear(x, weight.flatten(1))
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, list(stride), list(padding), list(dilation))
        y = y.permute(0, 2, 3, 1)
    return _epilogue(y, bias, residual, activation).contiguous()


def _epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    return cast(Tensor, _ACTIVATION[activation](y))


torch.library.register_fake("fxsparse::shuffled_block", _fake, lib=_library)
_library.impl("shuffled_block", reference, "CompositeExplicitAutograd")
_library.impl("shuffled_block", _cpu, "CPU")
_library.impl("shuffled_block", _cuda, "CUDA")
