"""Shuffled block convolution and linear on a GPU, in Triton. Importing this does not import Triton; a call does.

Tests run them in Triton's interpreter, compile them for sm_80 and sm_90 and, marked `gpu`, ran on an H200.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fxsparse.errors import InputError, TargetError, near
from fxsparse.kernels.shared import ACTIVATIONS, epilogue, output_sizes

Pair = tuple[int, int]
WHERE = "shuffled block kernel for CUDA"
LARGEST_WINDOW = 63  # height + width: a bit each
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW_ROWS, FEW_COLUMNS = 32, 128  # a program's at a time, of a layer of few tokens
MULTIPROCESSORS = 132  # of an H100 or H200; others differ by little
PACKED = {"rows": torch.int32, "row_ptr": torch.int32, "columns": torch.int32, "column_ptr": torch.int32,
          "values": None, "value_ptr": torch.int64}  # fmt: skip
# what x may be, and how it becomes so
_LAYOUTS = {
    "[N, H, W, I]": "A channels_last tensor becomes one without a copy: x.permute(0, 2, 3, 1).",
    "[I, tokens]": "Tokens lie side by side here: x.t().contiguous() of [tokens, I].",
    "[tokens, I]": "Flatten what is not features: x.flatten(0, -2).contiguous().",
}


class Tiles(NamedTuple):
    """How a GPU cuts the work: powers of two, the first three at least 16.

    pixels, rows   a program's tile of the output
    columns        kept columns that are gathered and multiplied at a time
    warps, stages  of a program, and of its software pipeline
    """

    pixels: int
    rows: int
    columns: int
    warps: int = 4
    stages: int = 3


@functools.cache
def digest() -> str:
    """Of the kernels' source: a remembered time holds for this text only."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:16]


def shuffled_block_conv2d(
    x: Tensor, rows: Tensor, row_ptr: Tensor, columns: Tensor, column_ptr: Tensor, values: Tensor, value_ptr: Tensor,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none", *,
    kernel: Pair, out_channels: int, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1),
    tiles: Tiles | Literal["autotune"] | None = None,
) -> Tensor:  # fmt: skip
    """activation(conv2d(x, the packed weight) + bias + residual), NHWC, ungrouped, zero padded, for inference.

    x           [N, H, W, I], contiguous, float16, bfloat16 or float32; sums are float32, and float32 is multiplied in
                tf32 where PyTorch's switches allow it: cuDNN's for windows, that of matrix products for 1x1
    rows        [packed rows] int32, the output channel of each; group g holds rows[row_ptr[g]:row_ptr[g + 1]]
    columns     [sum K_g] int32, flat indices into [kH, kW, I]; group g keeps columns[column_ptr[g]:column_ptr[g + 1]]
    values      [sum K_g * L_g], dtype of x, L_g = the group's rows rounded up to 16; group g is a row-major [K_g, L_g]
                from value_ptr[g] on
    row_ptr, column_ptr  [G + 1] int32; value_ptr  [G + 1] int64
    bias        [O], any float dtype
    residual    [N, OH, OW, O], contiguous, any float dtype
    activation  a key of ACTIVATIONS; gelu is the exact one
    tiles       None: by rule; "autotune": the fastest of a short list, timed once for each shape
    Returns [N, OH, OW, O] in the dtype of x.

    Assumed, because looking at it would wait for the device; who packs has checked it: indices are in range, pointers
    ascend from 0 to the lengths, value_ptr is made of multiples of 16, no output channel is packed twice. A group may
    have any number of rows and no columns. Channels in no group are written by torch first, in a pass of their own
    over y: a group without columns is the cheaper way to pack them.
    Raises InputError for an argument that does not fit, TargetError without Triton or a device.
    """
    packed = (rows, row_ptr, columns, column_ptr, values, value_ptr)
    _check_packed(x, packed, "[N, H, W, I]")
    shape = _output_shape(x, kernel, stride, padding, dilation, out_channels)
    _check_epilogue(x, bias, residual, activation, shape)
    kernels = _load("shuffled_block", x)
    if 0 in shape:
        return x.new_empty(shape)
    if rows.numel() < out_channels:
        # what a channel without weights is, everywhere: only packed rows are left to write
        y = epilogue(x.new_zeros(shape, dtype=torch.float32), bias, residual, activation).to(x.dtype)
    else:
        y = x.new_empty(shape)
    if rows.numel():
        kernels.launch(x, packed, bias, residual, y, activation, kernel, stride, padding, dilation, tiles)
    return y


def shuffled_block_linear(
    x: Tensor, rows: Tensor, row_ptr: Tensor, columns: Tensor, column_ptr: Tensor, values: Tensor, value_ptr: Tensor,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none", *,
    out_features: int, tiles: Tiles | Literal["autotune"] | None = None,
) -> Tensor:  # fmt: skip
    """activation(linear(x, the packed weight) + bias + residual) for x [..., I]: a 1x1 convolution of 1x1 images.

    residual [..., O]; the rest is as for `shuffled_block_conv2d`. Returns [..., O].
    """
    if residual is not None:
        _check_shape("residual", residual, (*x.shape[:-1], out_features), x.device)
    y = shuffled_block_conv2d(
        x.reshape(-1, 1, 1, x.shape[-1]), rows, row_ptr, columns, column_ptr, values, value_ptr, bias,
        None if residual is None else residual.reshape(-1, 1, 1, out_features), activation,
        kernel=(1, 1), out_channels=out_features, tiles=tiles,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], out_features)


def shuffled_block_transposed(
    x: Tensor, rows: Tensor, row_ptr: Tensor, columns: Tensor, column_ptr: Tensor, values: Tensor, value_ptr: Tensor,
    bias: Tensor | None = None, activation: str = "none", *, out_features: int, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """activation(the packed weight @ x + bias[:, None]) for x [I, tokens]: [out_features, tokens].

    The rest is as for `shuffled_block_conv2d`, but for `rows`: every one of `out_features` is in a group.
    """
    packed = (rows, row_ptr, columns, column_ptr, values, value_ptr)
    _check_packed(x, packed, "[I, tokens]")
    _check_epilogue(x, bias, None, activation, torch.Size([out_features]))
    _check_rows(rows, out_features)
    kernels = _load("transposed", x)
    y = x.new_empty(out_features, x.shape[1])
    if y.numel():
        kernels.launch(x, packed, bias, y, activation, tiles)
    return y


def shuffled_block_few(
    x: Tensor, rows: Tensor, row_ptr: Tensor, columns: Tensor, column_ptr: Tensor, values: Tensor, value_ptr: Tensor,
    *, out_features: int,
) -> Tensor:  # fmt: skip
    """The packed weight times x [tokens, I] in parts to be summed: float32 [few_parts(...), tokens, out_features].

    For so few tokens that reading the weight takes the time. The rest is as for `shuffled_block_transposed`.
    """
    packed = (rows, row_ptr, columns, column_ptr, values, value_ptr)
    _check_packed(x, packed, "[tokens, I]")
    _check_rows(rows, out_features)
    kernels = _load("few", x)
    y = x.new_empty(few_parts(rows, row_ptr, columns), x.shape[0], out_features, dtype=torch.float32)
    if y.numel():
        kernels.launch(x, packed, y)
    return y


def few_parts(rows: Tensor, row_ptr: Tensor, columns: Tensor) -> int:
    """Into how many parts `shuffled_block_few` cuts the columns of each group of these vectors."""
    groups = max(row_ptr.numel() - 1, 1)
    programs = groups * -(-rows.numel() // (groups * FEW_ROWS))
    rounds = -(-columns.numel() // (groups * FEW_COLUMNS))
    return max(1, min(-(-2 * MULTIPROCESSORS // max(programs, 1)), rounds // 2))


def turned(x: Tensor) -> Tensor:
    """The matrix x [rows, columns], of any dtype, as [columns, rows].

    Raises InputError for what is no matrix, TargetError without Triton or a device.
    """
    if x.dim() != 2:
        do = "Flatten what is not features: x.flatten(0, -2)."
        raise InputError("x", expected="a matrix [rows, columns]", got=_kind(x), do=do)
    x, y = x.contiguous(), x.new_empty(x.shape[::-1])
    kernels = _load("turn", x)
    if y.numel():
        kernels.launch(x, y)
    return y


def _load(name: str, x: Tensor) -> Any:
    """A module of kernels. Raises TargetError when Triton is not installed or cannot run where `x` is."""
    try:
        kernels = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        do = "Install a build of torch for CUDA, which brings it, or run on the CPU."
        raise TargetError(WHERE, expected="the package triton", got="none installed", do=do) from None
    if x.device.type != "cuda" and not kernels.INTERPRETED:
        do = "Move the tensors, or set TRITON_INTERPRET=1 before Triton is first imported."
        raise TargetError(WHERE, expected="x on a CUDA device", got=f"x on {x.device}", do=do)
    return kernels


def _check_packed(x: Tensor, packed: tuple[Tensor, ...], shape: str) -> None:
    if x.dim() != shape.count(",") + 1 or x.dtype not in DTYPES or not x.is_contiguous():
        expected = f"contiguous float16, bfloat16 or float32 {shape}"
        raise InputError("x", expected=expected, got=_kind(x), do=_LAYOUTS[shape])
    for (name, dtype), tensor in zip(PACKED.items(), packed, strict=True):
        dtype = dtype or x.dtype
        if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.device != x.device:
            do = "Pack the weight in the dtype and on the device of x."
            raise InputError(name, expected=f"a contiguous {dtype} vector on {x.device}", got=_kind(tensor), do=do)
    lengths = [packed[i].numel() for i in (1, 3, 5)]
    if len(set(lengths)) > 1 or 0 in lengths:
        do = "Each says where every group begins, and at last where the last one ends."
        expected = "three vectors of length groups + 1"
        raise InputError("row_ptr, column_ptr, value_ptr", expected=expected, got=f"lengths {lengths}", do=do)


def _check_rows(rows: Tensor, out_features: int) -> None:
    if rows.numel() != out_features:
        do = "Put rows without weights into a group without columns."
        raise InputError("rows", expected=f"{out_features} rows", got=f"{rows.numel()}", do=do)


def _output_shape(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, channels: int) -> torch.Size:
    """[N, OH, OW, O]. Raises InputError for a window that does not fit, or sizes beyond what the kernel counts with."""
    if sum(kernel) > LARGEST_WINDOW:
        do = "Leave this layer dense."
        raise InputError("kernel", expected=f"height + width of at most {LARGEST_WINDOW}", got=f"{kernel}", do=do)
    sizes = output_sizes(x.shape[1:3], kernel, stride, padding, dilation)
    if min(sizes) < 1:
        do = f"x is {_kind(x)}, kernel {kernel}, padding {padding}, dilation {dilation}."
        raise InputError("kernel", expected="a window that fits into the padded image", got=f"output {sizes}", do=do)
    shape = torch.Size((x.shape[0], *sizes, channels))
    if x.shape[1:].numel() >= 2**31 or shape[:3].numel() >= 2**31 - 2**10:
        expected = "images of fewer than 2**31 elements, and fewer output pixels"
        raise InputError("x", expected=expected, got=f"{_kind(x)} to {list(shape)}", do="Split the batch.")
    return shape


def _check_epilogue(x: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, shape: torch.Size) -> None:
    if act not in ACTIVATIONS:
        do = near(act, ACTIVATIONS) or "Apply it to the result."
        raise InputError("activation", expected=f"one of {', '.join(ACTIVATIONS)}", got=repr(act), do=do)
    for name, tensor, wanted in (("bias", bias, shape[-1:]), ("residual", residual, shape)):
        if tensor is not None:
            _check_shape(name, tensor, wanted, x.device)


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], device: torch.device) -> None:
    fits = tensor.shape == wanted and tensor.is_contiguous() and tensor.device == device
    if not fits or not tensor.is_floating_point():
        expected = f"a contiguous float tensor {list(wanted)} on {device}"
        do = "Its layout is that of the output: channels last." if len(wanted) > 1 else "One number for each channel."
        raise InputError(name, expected=expected, got=_kind(tensor), do=do)


def _kind(tensor: Tensor) -> str:
    contiguous = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{contiguous}"
