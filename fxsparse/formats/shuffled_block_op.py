"""The operator `fxsparse::shuffled_block`: convolution and matrix product with a packed weight, channels last.

    shuffled_block(x, values, value_ptr, columns, column_ptr, rows, row_ptr, bias, residual,
                   shape, stride, padding, dilation, activation, lanes) -> act(x * w + bias + residual)

`shape` is the weight's, [O, I, kH, kW] or [O, I]. x is [N, H, W, I] and the result [N, OH, OW, O]; with a 1x1 kernel,
stride 1 and no padding x may be [..., I]. On a CPU x and values both in float32, or both in bfloat16, run the C++
kernel, on CUDA x and values both in float32 or float16 the Triton kernel; all else unpacks the weight and runs dense.
It has no gradient. Targets for GPUs replace it in linear layers: `shuffled_block_gpu`.
The six arrays, and `lanes`, are trusted, `ShuffledBlock` checked them; all else is checked here. `ShuffledBlockFormat`
puts it into a graph:

    conv2d(x, w, b) -> permute(shuffled_block(contiguous(permute(x)), packed w, b))     channels last inside
    linear(x, w, b) -> shuffled_block(contiguous(x), packed w, b)

An input of the model is not made contiguous for it: the C++ kernel reads images [N, I, H, W] as they are.
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

from fxsparse.errors import InputError, near
from fxsparse.formats.format import Format, Standard
from fxsparse.formats.operator import LIBRARY, define
from fxsparse.formats.shuffled_block import ARRAYS, ShuffledBlock, pack, split, unpack
from fxsparse.formats.shuffled_block_aten import TO_FIRST, TO_LAST, expand, standard
from fxsparse.formats.shuffled_block_layer import fold, unfold
from fxsparse.ir.graph import arg, aten, get_tensor, new_weight
from fxsparse.kernels.build import instruction_set
from fxsparse.kernels.cpu.shuffled_block import register_operator
from fxsparse.kernels.cpu.shuffled_block import run as run_on_cpu
from fxsparse.kernels.shared import ACTIVATIONS, epilogue, output_sizes
from fxsparse.kernels.triton import DTYPES as TRITON_DTYPES
from fxsparse.kernels.triton import LARGEST_WINDOW, shuffled_block_conv2d, shuffled_block_linear

Pair = Sequence[int]
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
LARGEST_IMAGE = 2**29  # elements: the kernel counts with 32 bits inside an image, padding included
LEAST_PIXELS = 64  # as in kernels/cpu/shuffled_block.h
_INDEX_DTYPES = [torch.int64, *[torch.int32] * 4]  # of value_ptr and what follows it


def _unfolded(x: Tensor, values: Tensor, layer: Tensor, residual: Tensor | None) -> Sequence[Any]:
    packed, bias, rest = unfold(values, layer)
    return x, *packed, bias, residual, *rest


shuffled_block, shuffled_block_into = define(
    "shuffled_block",
    "Tensor x, Tensor values, Tensor value_ptr, Tensor columns, Tensor column_ptr, Tensor rows, Tensor row_ptr,"
    " Tensor? bias, Tensor? residual, int[] shape, int[2] stride, int[2] padding, int[2] dilation, str activation,"
    " str lanes",
    register_operator,
    KERNEL_DTYPES,
    folded=("Tensor x, Tensor values, Tensor layer, Tensor? residual", _unfolded),
)


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
    """`act(x * w + bias + residual)` [N, OH, OW, O] for x [N, H, W, I]; [..., O] for [..., I] and a linear weight.

    bias [O] and residual, of the result's shape, have the dtype of x. Raises InputError for what does not fit.
    """
    arguments = (list(packed.shape), list(stride), list(padding), list(dilation), activation, packed.lanes)
    return cast(Tensor, shuffled_block(x, *packed.tensors, bias, residual, *arguments))


def pointwise(kernel: Pair, stride: Pair, padding: Pair) -> bool:
    """Whether every output pixel reads its own input pixel only: then x may have any number of dimensions."""
    return all(size == 1 for size in (*kernel, *stride)) and not any(padding)


def _output_shape(x: Tensor, shape: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> list[int]:
    """Raises InputError when x is not what the weight is for: the kernel would read past its end."""
    if x.shape[-1] != shape[1]:
        raise _misfit("x", f"{shape[1]} channels in the last dimension", f"shape {tuple(x.shape)}")
    kernel = shape[2:]
    if pointwise(kernel, stride, padding):
        return [*x.shape[:-1], shape[0]]
    if x.dim() != 4:
        raise _misfit("x", "[N, H, W, I] for a convolution", f"shape {tuple(x.shape)}")
    sizes = output_sizes(x.shape[1:3], kernel, stride, padding, dilation)
    if min(sizes) < 1:
        raise _misfit("x", f"an image that the {kernel[0]}x{kernel[1]} kernel fits into", f"shape {tuple(x.shape)}")
    return [x.shape[0], *sizes, shape[0]]


def _check_epilogue(
    x: Tensor, y_shape: Sequence[int], bias: Tensor | None, residual: Tensor | None, activation: str
) -> None:
    if activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r}", expected=f"one of {', '.join(ACTIVATIONS)}", got="another name",
                         do=near(activation, ACTIVATIONS) or "Apply it to the result.")  # fmt: skip
    for name, tensor, wanted in (("bias", bias, y_shape[-1:]), ("residual", residual, y_shape)):
        if tensor is not None and (list(tensor.shape) != list(wanted) or tensor.dtype != x.dtype):
            raise _misfit(name, f"{x.dtype} {list(wanted)}", f"{tensor.dtype} {list(tensor.shape)}")


def _misfit(what: str, expected: str, got: str) -> InputError:
    do = "Channels are last: x [N, H, W, I] or [..., I], the residual in the shape and dtype of the result."
    return InputError(f"{what} of a shuffled-block product", expected=expected, got=got, do=do)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(_output_shape(x, *arguments[8:12]))


def _cpu(x: Tensor, *arguments: Any) -> Tensor:
    """The C++ kernel. Called once per layer: at batch 1 every microsecond here is seen in the whole network."""
    packed, bias, residual = arguments[:6], arguments[6], arguments[7]
    shape, stride, padding, dilation, activation, lanes = arguments[8:]
    has_kernel = packed[0].dtype == x.dtype in KERNEL_DTYPES
    if not has_kernel or not x.numel() or x.shape[1:].numel() > LARGEST_IMAGE:
        return reference(x, *arguments)
    y = x.new_empty(_output_shape(x, shape, stride, padding, dilation))
    in_planes = lanes == "pixels" and not pointwise(shape[2:], stride, padding)
    if in_planes and _planes(y, shape, stride, dilation) > LARGEST_IMAGE:
        return reference(x, *arguments)
    _check_epilogue(x, y.shape, bias, residual, activation)
    planes = lanes == "rows" and _channels_first(x, padding)
    x = x if planes else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    x4, y4 = (x, y) if x.dim() == 4 else (x.view(1, 1, -1, x.shape[-1]), y.view(1, 1, -1, shape[0]))
    geometry = (shape[2:] or (1, 1), stride, padding, dilation)
    run_on_cpu(x4, y4, packed, bias, residual, geometry, activation, lanes, planes=planes)
    return y


def _channels_first(x: Tensor, padding: Pair) -> bool:
    """Whether x is [N, I, H, W] in memory, which the kernel reads as it is; `in_planes` in shuffled_block_torch.cpp."""
    if x.is_contiguous() or x.dim() != 4 or not x.permute(TO_FIRST).is_contiguous():
        return False
    padded = [size + 2 * beside for size, beside in zip(x.shape[1:3], padding, strict=True)]
    return padded[0] * padded[1] * x.shape[3] <= LARGEST_IMAGE


def _planes(y: Tensor, shape: Sequence[int], stride: Pair, dilation: Pair) -> int:
    """At least what a convolution lays out at once with pixels in lanes; as in shuffled_block_torch.cpp."""
    row = y.shape[2] * stride[1] + (shape[3] - 1) * dilation[1] + 1
    rows = 2 * stride[0] + (shape[2] - 1) * dilation[0]
    return shape[1] * (stride[0] * stride[1] * 2 * LEAST_PIXELS + rows * row)


def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    """The Triton kernel, which takes no pairs."""
    (values, value_ptr, columns, column_ptr, rows, row_ptr), bias, residual = arguments[:6], arguments[6], arguments[7]
    shape, stride, padding, dilation, activation, lanes = arguments[8:]
    has_kernel = values.dtype == x.dtype in TRITON_DTYPES and x.dtype != torch.bfloat16
    if not has_kernel or not x.numel() or lanes != "rows":
        return reference(x, *arguments)
    _check_epilogue(x, _output_shape(x, shape, stride, padding, dilation), bias, residual, activation)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    packed = (rows, row_ptr, columns, column_ptr, values, value_ptr)
    if pointwise(shape[2:], stride, padding):
        return shuffled_block_linear(x, *packed, bias, residual, activation, out_features=shape[0])
    pairs = {"kernel": shape[2:], "stride": stride, "padding": padding, "dilation": dilation}
    geometry: Any = {name: tuple(pair) for name, pair in pairs.items()}
    return shuffled_block_conv2d(x, *packed, bias, residual, activation, out_channels=shape[0], **geometry)


def reference(x: Tensor, *arguments: Any) -> Tensor:
    """The same in PyTorch's own operators, on any device and in any dtype."""
    packed, bias, residual = arguments[:6], arguments[6], arguments[7]
    shape, stride, padding, dilation, activation, lanes = arguments[8:]
    _check_epilogue(x, _output_shape(x, shape, stride, padding, dilation), bias, residual, activation)
    values, value_ptr, columns, column_ptr, rows, row_ptr = (t.cpu() for t in packed)
    weight = unpack(ShuffledBlock(values, value_ptr, columns, column_ptr, rows, row_ptr, tuple(shape), lanes)).to(x)
    if pointwise(shape[2:], stride, padding):
        y = F.linear(x, weight.flatten(1))
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, list(stride), list(padding), list(dilation))
        y = y.permute(0, 2, 3, 1)
    return epilogue(y, bias, residual, activation).contiguous()


torch.library.register_fake("fxsparse::shuffled_block", _fake, lib=LIBRARY)
LIBRARY.impl("shuffled_block", reference, "CompositeExplicitAutograd")
LIBRARY.impl("shuffled_block", _cpu, "CPU")
LIBRARY.impl("shuffled_block", _cuda, "CUDA")


class ShuffledBlockFormat(Format):
    """conv2d without groups, and linear, in float32 and bfloat16; on CUDA linear in float16 too, conv2d in float32."""

    name = "shuffled_block"
    layers = (aten.conv2d.default, aten.linear.default)
    operator = shuffled_block

    def why_not(self, node: fx.Node, weight: Tensor) -> str:
        if why := self._no_rows(node, weight):
            return why
        if weight.dtype not in (TRITON_DTYPES if weight.is_cuda else KERNEL_DTYPES):
            return f"the kernel has no {str(weight.dtype).removeprefix('torch.')}"
        if weight.is_cuda and weight.dim() == 4 and weight.dtype != torch.float32:
            return "in 16 bits cuDNN's convolution is several times faster than a GPU's gathers"
        if weight.is_cuda and sum(weight.shape[2:]) > LARGEST_WINDOW:
            return f"on a GPU the kernel takes windows of height + width up to {LARGEST_WINDOW}"
        return ""

    def why_not_untimed(self, node: fx.Node) -> str:
        return "on a GPU only a timing can tell" if node.meta["val"].is_cuda else ""

    def why_not_standard(self, node: fx.Node, weight: Tensor) -> str:
        return self._no_rows(node, weight)

    def _no_rows(self, node: fx.Node, weight: Tensor) -> str:
        """Why this layer is no product with rows of one list of columns."""
        if node.target not in self.layers:
            return "only conv2d and linear have this kernel"
        if node.target is aten.conv2d.default and arg(node, "groups") != 1:
            return "a grouped convolution has no columns to choose from"
        if weight.dim() not in (2, 4) or not weight.numel():
            return f"the weight has shape {tuple(weight.shape)}"
        if node.target is aten.conv2d.default and node.meta["val"].dim() != 4:
            return "an image without a batch"
        return ""

    def pack(self, weight: Tensor, groups: Sequence[NDArray[np.int64]] | None = None) -> ShuffledBlock:
        return pack(weight, groups)

    def unpack(self, packed: ShuffledBlock) -> Tensor:
        return unpack(packed)

    def standard(self, packed: ShuffledBlock) -> Standard:
        return standard(packed)

    def expand(self, gm: fx.GraphModule, node: fx.Node) -> fx.Node:
        return expand(gm, node)

    def lower(self, gm: fx.GraphModule, node: fx.Node, packed: ShuffledBlock) -> fx.Node:
        is_conv, call = node.target is aten.conv2d.default, gm.graph.call_function
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        packed = packed if weight.meta["val"].is_cuda else as_run(packed)
        tensors = [_stored(gm, node, weight, name, packed) for name in ARRAYS]
        names = ("stride", "padding", "dilation")
        geometry = [pair(arg(node, n)) for n in names] if is_conv else [[1, 1], [0, 0], [1, 1]]
        with gm.graph.inserting_before(node):
            x = node.all_input_nodes[0]
            as_given = is_conv and packed.lanes == "rows" and x.op == "placeholder" and not x.meta["val"].is_cuda
            x = call(aten.permute.default, (x, TO_LAST)) if as_given else channels_last(gm, x, is_conv)
            rest: tuple[Any, ...] = (list(packed.shape), *geometry, "none", packed.lanes)
            y = call(shuffled_block, (x, *tensors, arg(node, "bias"), None, *rest))
            return call(aten.permute.default, (y, TO_FIRST)) if is_conv else y

    def into(self, gm: fx.GraphModule, node: fx.Node) -> Sequence[Any] | None:
        x, values, *indices, bias, residual = node.args[:9]
        stored = [values, *indices, *([] if bias is None else [bias])]
        if any(not isinstance(n, fx.Node) or n.op != "get_attr" for n in stored):
            return None
        tensors = [get_tensor(gm, str(cast(fx.Node, n).target)) for n in stored]
        shape, *windows, activation, lanes = cast(Any, node.args[9:])
        constant = tensors[6] if bias is not None else None
        _check_epilogue(tensors[0], shape[:1], constant, None, activation)  # once: the kernel trusts what is folded
        layer = fold(tensors[:6], constant, shape, windows, activation, lanes)
        name = f"{cast(fx.Node, values).target}_layer"
        return x, values, new_weight(gm, node, name, layer), residual

    def check_call(self, arguments: Sequence[Any]) -> None:
        arrays, shape, pairs, activation, lanes = arguments[1:7], arguments[9], arguments[10:13], *arguments[13:]
        kinds = [getattr(a, "dtype", None) for a in arrays]
        if (
            kinds[0] not in (*KERNEL_DTYPES, torch.float16)
            or kinds[1:] != _INDEX_DTYPES
            or any(a.dim() != 1 for a in arrays)
        ):
            raise _misfit(
                "a stored array", f"flat arrays of float32, bfloat16 or float16 and {_INDEX_DTYPES}", str(kinds)
            )
        lowest = zip(pairs, (1, 0, 1), strict=True)  # stride, padding, dilation
        if len(shape) not in (2, 4) or min(shape) < 1 or any(len(p) != 2 or min(p) < low for p, low in lowest):
            raise _misfit("the geometry", "a weight of two or four dimensions and pairs of sizes", f"{shape}, {pairs}")
        if activation not in ACTIVATIONS:
            raise _misfit("the activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
        values, value_ptr, columns, column_ptr, rows, row_ptr = arrays
        ShuffledBlock(values, value_ptr, columns, column_ptr, rows, row_ptr, tuple(shape), lanes)


def as_run(packed: ShuffledBlock) -> ShuffledBlock:
    """`packed` as this processor's kernel likes it best: narrow vectors take 16 rows at once, not 64."""
    return packed if instruction_set().startswith("AVX512") or packed.lanes != "rows" else split(packed)


def channels_last(gm: fx.GraphModule, x: fx.Node, is_conv: bool) -> fx.Node:
    """`x` as the kernel reads it: contiguous, the channels of an image moved last."""
    call = gm.graph.call_function
    return call(aten.contiguous.default, (call(aten.permute.default, (x, TO_LAST)) if is_conv else x,))


def pair(value: int | Sequence[int]) -> list[int]:
    """One int for both dimensions, or two."""
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _stored(gm: fx.GraphModule, node: fx.Node, weight: fx.Node, name: str, packed: ShuffledBlock) -> fx.Node:
    tensor: Tensor = getattr(packed, name).to(weight.meta["val"].device)
    return new_weight(gm, node, f"{weight.target}_{name}", tensor)
