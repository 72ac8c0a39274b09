"""The operator `fxsparse::shuffled_block`: convolution and matrix product with a packed weight, channels last.

    shuffled_block(x, values, value_ptr, columns, column_ptr, rows, row_ptr, bias, residual,
                   out_channels, kernel, stride, padding, dilation, activation) -> act(x * w + bias + residual)

x is [N, H, W, I] and the result [N, OH, OW, O]; with a 1x1 kernel, stride 1 and no padding x may be [..., I]. float32
and bfloat16 on a CPU run the C++ kernel, on CUDA the Triton kernel; anything else unpacks the weight and runs dense.
It has no gradient. `ShuffledBlockFormat` puts it into a graph:

    conv2d(x, w, b) -> permute(shuffled_block(contiguous(permute(x)), packed w, b))     channels last inside
    linear(x, w, b) -> shuffled_block(contiguous(x), packed w, b)

Two such convolutions in a row leave no copy between them: the permutes cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from fxsparse.formats.format import Format
from fxsparse.formats.shuffled_block import ShuffledBlock, pack, unpack
from fxsparse.ir.graph import arg, aten, new_weight
from fxsparse.kernels.cpu.shuffled_block import run as run_on_cpu
from fxsparse.kernels.triton import DTYPES as TRITON_DTYPES
from fxsparse.kernels.triton import shuffled_block_conv2d, shuffled_block_linear

Pair = Sequence[int]
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
LARGEST_IMAGE = 2**29  # elements: the kernel counts with 32 bits inside an image, padding included
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
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
    return kernel[0] == kernel[1] == stride[0] == stride[1] == 1 and padding[0] == padding[1] == 0


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    out_channels, kernel, stride, padding, dilation, _ = arguments[8:]
    return x.new_empty(_shape(x, out_channels, kernel, stride, padding, dilation))


def _cpu(x: Tensor, *arguments: Any) -> Tensor:
    """The C++ kernel. Called once per layer: at batch 1 every microsecond here is seen in the whole network."""
    packed, bias, residual = arguments[:6], arguments[6], arguments[7]
    out_channels, kernel, stride, padding, dilation, activation = arguments[8:]
    if x.dtype not in KERNEL_DTYPES or not x.numel() or x.shape[1:].numel() > LARGEST_IMAGE:
        return reference(x, *arguments)
    y = x.new_empty(_shape(x, out_channels, kernel, stride, padding, dilation))
    if packed[4].shape[0] < out_channels:
        y.copy_(_epilogue(torch.zeros_like(y), bias, residual, activation))
    if packed[0].dtype != torch.float32:
        packed = (packed[0].float(), *packed[1:])
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    x4, y4 = (x, y) if x.dim() == 4 else (x.view(1, 1, -1, x.shape[-1]), y.view(1, 1, -1, out_channels))
    run_on_cpu(x4, y4, packed, bias, residual, (kernel, stride, padding, dilation), activation)
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


class ShuffledBlockFormat(Format):
    """conv2d without groups, and linear, in float32 and bfloat16."""

    name = "shuffled_block"

    def why_not(self, node: fx.Node, weight: Tensor) -> str:
        if node.target not in (aten.conv2d.default, aten.linear.default):
            return "only conv2d and linear have this kernel"
        if node.target is aten.conv2d.default and arg(node, "groups") != 1:
            return "a grouped convolution has no columns to choose from"
        if weight.dtype not in KERNEL_DTYPES:
            return f"the kernel has no {str(weight.dtype).removeprefix('torch.')}"
        if weight.dim() not in (2, 4) or not weight.numel():
            return f"the weight has shape {tuple(weight.shape)}"
        return ""

    def pack(self, weight: Tensor, groups: Sequence[NDArray[np.int64]] | None = None) -> ShuffledBlock:
        return pack(weight, groups)

    def unpack(self, packed: ShuffledBlock) -> Tensor:
        return unpack(packed)

    def lower(self, gm: fx.GraphModule, node: fx.Node, packed: ShuffledBlock) -> fx.Node:
        is_conv = node.target is aten.conv2d.default
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        tensors = [_stored(gm, node, weight, name, packed) for name in packed.names]
        names = ("stride", "padding", "dilation")
        geometry = [pair(arg(node, n)) for n in names] if is_conv else [[1, 1], [0, 0], [1, 1]]
        with gm.graph.inserting_before(node):
            x = channels_last(gm, node.all_input_nodes[0], is_conv)
            sizes: tuple[Any, ...] = (packed.shape[0], packed.kernel, *geometry, "none")
            y = gm.graph.call_function(shuffled_block, (x, *tensors, arg(node, "bias"), None, *sizes))
            return gm.graph.call_function(aten.permute.default, (y, TO_FIRST)) if is_conv else y


def channels_last(gm: fx.GraphModule, x: fx.Node, is_conv: bool) -> fx.Node:
    """`x` as the kernel reads it: contiguous, the channels of an image moved last."""
    call = gm.graph.call_function
    return call(aten.contiguous.default, (call(aten.permute.default, (x, TO_LAST)) if is_conv else x,))


def pair(value: int | Sequence[int]) -> list[int]:
    """One int for both dimensions, or two."""
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _stored(gm: fx.GraphModule, node: fx.Node, weight: fx.Node, name: str, packed: ShuffledBlock) -> fx.Node:
    tensor: Tensor = getattr(packed, name).to(weight.meta["val"].device)
    if name == "values":  # the kernels multiply in float32, whatever the activations are
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return new_weight(gm, node, f"{weight.target}_{name}", tensor)
