"""`fxsparse::shuffled_block` in ATen operators that exporters know: gather, grouped convolution or batched product.

    y[rows_g] = W_g x[columns_g]          for groups g = 0 .. G-1

Linear: x is turned to [I, M], so that a gather copies whole rows; then one batched product [G, R, K] @ [G, K, M].
Convolution: where the groups keep whole channels, gather the channels and convolve in G groups. Where every tap keeps
channels of its own, the taps' shifted images are stacked first (im2col, of those channels that any group reads), and
the convolution is 1x1. Groups of unequal size are put into buckets and filled up with zeros, at most `WASTE` times.
Rows that follow each other in the order of the buckets need no gather at the end: `permute_channels` numbers them so.
Zeros that fill up multiply what the dense layer multiplies with zeros too, so NaN and infinity reach the same rows.
With pixels in lanes groups are too small for any of this: that is the dense layer again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.formats.format import Standard
from fxsparse.formats.shuffled_block import ARRAYS, ShuffledBlock, apart, unpack
from fxsparse.ir.graph import arg, aten, new_weight, weight_of

# Measured in ONNX Runtime 1.32 on one core (AMD EPYC with AVX-512), groups of 64 rows, a quarter of the columns:
# stacking the taps, or turning a linear layer's input, costs 1.4 to 1.9 times the products alone.
OVERHEAD = 1.5
WASTE = 1.1
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
ACTIVATIONS = {
    "relu": aten.relu.default, "relu6": aten.relu6.default, "silu": aten.silu.default,
    "gelu": aten.gelu.default, "hardswish": aten.hardswish.default,
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Rows [R] that read the same columns [K] by a dense weight [R, K, *taps]."""

    rows: Tensor
    columns: Tensor
    weight: Tensor


def standard(packed: ShuffledBlock) -> Standard:
    """Work and order of groups, for `choose_formats`."""
    blocks, stacked = _form(packed)
    found = buckets(blocks)
    cost = sum(map(_filled, found)) * (OVERHEAD if stacked or len(packed.shape) == 2 else 1.0)
    groups = [b.rows.numpy() for bucket in found for b in bucket if bool((b.weight != 0).any())]
    return Standard(round(cost), groups)


def expand(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """See the module's text. Bias, residual and activation follow, as in the operator."""
    tensors = {name: cast(Tensor, weight_of(gm, arg(node, name))).cpu() for name in ARRAYS}
    packed = ShuffledBlock(**tensors, shape=tuple(arg(node, "shape")), lanes=arg(node, "lanes"))
    build = _Builder(gm, node, packed)
    is_dense = packed.lanes == "pixels"
    with gm.graph.inserting_before(node):
        if len(packed.shape) == 2:
            return build.finished(build.dense() if is_dense else build.linear(), arg(node, "residual"))
        residual = arg(node, "residual")  # channels first, so that the permutes between two layers are neighbors
        first = None if residual is None else build.call(aten.permute.default, residual, TO_FIRST)
        y = build.dense() if is_dense else build.convolution()
        return build.call(aten.permute.default, build.finished(y, first), TO_LAST)


def buckets(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks that run together, filled up to the largest of them."""
    found: list[list[Block]] = []
    for block in sorted(blocks, key=lambda b: (-len(b.rows), -len(b.columns))):
        if found and _filled([*found[-1], block]) <= WASTE * _work([*found[-1], block]):
            found[-1].append(block)
        else:
            found.append([block])
    place = {id(b): i for i, b in enumerate(blocks)}
    ordered = [sorted(bucket, key=lambda b: place[id(b)]) for bucket in found]
    return sorted(ordered, key=lambda bucket: place[id(bucket[0])])


def _filled(bucket: Sequence[Block]) -> int:
    taps = math.prod(bucket[0].weight.shape[2:])
    return len(bucket) * max(len(b.rows) for b in bucket) * max(len(b.columns) for b in bucket) * taps


def _work(blocks: Sequence[Block]) -> int:
    return sum(b.weight.numel() for b in blocks)


def _form(packed: ShuffledBlock) -> tuple[list[Block], bool]:
    """Blocks with channels for columns, or with taps and channels (True) where stacking the taps is less work."""
    blocks = _blocks(packed)
    if len(packed.shape) == 2:
        return blocks, False
    whole = _channels(blocks, packed.shape)
    stacked = math.prod(packed.shape[2:]) > 1 and OVERHEAD * _work(blocks) < _work(whole)
    return (blocks, True) if stacked else (whole, False)


def _blocks(packed: ShuffledBlock) -> list[Block]:
    """The groups; one without columns reads column 0, times zero."""
    found = []
    for g, rows in enumerate(packed.row_groups):
        columns = packed.columns[int(packed.column_ptr[g]) : int(packed.column_ptr[g + 1])].long()
        stored = packed.values[int(packed.value_ptr[g]) : int(packed.value_ptr[g + 1])]
        weight = (
            apart(stored, len(columns), packed.lanes)[:, : len(rows)].t() if len(columns) else stored.view(len(rows), 0)
        )
        found.append(_block(torch.from_numpy(rows), columns, weight))
    return found


def _block(rows: Tensor, columns: Tensor, weight: Tensor) -> Block:
    if not len(columns):
        columns, weight = columns.new_zeros(1), weight.new_zeros(len(rows), 1)
    return Block(rows, columns, weight)


def _channels(blocks: Sequence[Block], shape: Sequence[int]) -> list[Block]:
    """The same with columns that are channels: weight [R, K, kH * kW]."""
    found = []
    for block in blocks:
        channels = (block.columns % shape[1]).unique()
        weight = block.weight.new_zeros(len(block.rows), len(channels), math.prod(shape[2:]))
        weight[:, torch.searchsorted(channels, block.columns % shape[1]), block.columns // shape[1]] = block.weight
        found.append(Block(block.rows, channels, weight))
    return found


def _used(blocks: Sequence[Block], width: int) -> Tensor:
    """Columns that any block reads, ascending; all of a tap's where that is half of them: a gather less is worth it."""
    used = torch.cat([b.columns for b in blocks]).unique()
    whole = [tap for tap in (used // width).unique().tolist() if int((used // width == tap).sum()) * 2 > width]
    every = [torch.arange(width, device="cpu") + tap * width for tap in whole]
    return cast(Tensor, torch.cat([used, *every]).unique())


class _Builder:
    """Nodes for one call of the operator, inserted where the caller stands."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, packed: ShuffledBlock) -> None:
        self.gm, self.node, self.packed = gm, node, packed
        self.x, self.bias = cast(fx.Node, node.args[0]), weight_of(gm, arg(node, "bias"))
        self.like = self.x.meta["val"]
        self.name = str(cast(fx.Node, arg(node, "values")).target).removesuffix("_values")

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.gm.graph.call_function(target, args)

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        return new_weight(self.gm, self.node, f"{self.name}_{name}", tensor.contiguous().to(self.like.device))

    def gather(self, x: fx.Node, dim: int, index: Tensor, size: int) -> fx.Node:
        """Nothing when the index is all of the dimension in its own order."""
        if torch.equal(index, torch.arange(size, device="cpu")):
            return x
        return self.call(aten.index_select.default, x, dim, self.constant("index", index))

    def finished(self, y: fx.Node, residual: fx.Node | None) -> fx.Node:
        """act(y + residual)"""
        y = y if residual is None else self.call(aten.add.Tensor, y, residual)
        activation = arg(self.node, "activation")
        return y if activation == "none" else self.call(ACTIVATIONS[activation], y)

    def dense(self) -> fx.Node:
        """[..., I] -> [..., O], or [N, H, W, I] -> [N, O, OH, OW]"""
        weight, bias = self.constant("dense", self.cast(unpack(self.packed))), arg(self.node, "bias")
        if len(self.packed.shape) == 2:
            return self.call(aten.linear.default, self.x, weight, bias)
        geometry = [list(arg(self.node, name)) for name in ("stride", "padding", "dilation")]
        x = self.call(aten.permute.default, self.x, TO_FIRST)
        return self.call(aten.conv2d.default, x, weight, bias, *geometry)

    def linear(self) -> fx.Node:
        """[..., I] -> [..., O]"""
        width, parts = self.packed.shape[1], []
        found = buckets(_blocks(self.packed))
        turned = self.call(aten.t.default, self.call(aten.reshape.default, self.x, [-1, width]))
        for bucket in found:
            index, weight = _fill(bucket)
            z = self.call(aten.reshape.default, self.gather(turned, 0, index, width), [*weight.shape[::2], -1])
            y = self.call(aten.bmm.default, self.constant("blocks", self.cast(weight)), z)
            parts.append(self.call(aten.reshape.default, y, [weight.shape[0] * weight.shape[1], -1]))
        y = self.call(aten.t.default, self.joined(parts, found, 0))
        y = self.call(aten.reshape.default, y, [*self.leading(), self.packed.shape[0]])
        return y if self.bias is None else self.call(aten.add.Tensor, y, arg(self.node, "bias"))

    def leading(self) -> list[Any]:
        """Sizes of x but the last; the first symbolic one is worked out from the rest."""
        sizes: list[Any] = []
        for dim, size in enumerate(self.like.shape[:-1]):
            known = isinstance(size, int)
            rest = self.call(aten.sym_size.int, self.x, dim) if not known and -1 in sizes else -1
            sizes.append(size if known else rest)
        return sizes

    def convolution(self) -> fx.Node:
        """[N, H, W, I] -> [N, O, OH, OW]"""
        x, (blocks, stacked) = self.call(aten.permute.default, self.x, TO_FIRST), _form(self.packed)
        geometry = [list(arg(self.node, name)) for name in ("stride", "padding", "dilation")]
        kernel, width = list(self.packed.shape[2:]), self.packed.shape[1]
        if stacked:
            used = _used(blocks, width)
            x, width = self.stacked(x, used, geometry), len(used)
            blocks = [Block(b.rows, torch.searchsorted(used, b.columns), b.weight) for b in blocks]
            kernel, geometry = [1, 1], [[1, 1], [0, 0], [1, 1]]
        found, parts = buckets(blocks), []
        for bucket in found:
            index, weight = _fill(bucket)
            weight = self.cast(weight.reshape(-1, weight.shape[2], *kernel))
            z, bias = self.gather(x, 1, index, width), self.bias_of(bucket, len(weight))
            parts.append(
                self.call(aten.conv2d.default, z, self.constant("blocks", weight), bias, *geometry, len(bucket))
            )
        return self.joined(parts, found, 1)

    def stacked(self, x: fx.Node, used: Tensor, geometry: list[list[int]]) -> fx.Node:
        """The columns `used` (tap * I + channel, ascending) of im2col(x), as channels [N, len(used), OH, OW]."""
        (stride, padding, dilation), (kernel_w, width) = geometry, (self.packed.shape[3], self.packed.shape[1])
        sizes = [int(s) for s in self.node.meta["val"].shape[1:3]]
        if any(padding):
            x = self.call(aten.constant_pad_nd.default, x, [padding[1], padding[1], padding[0], padding[0]], 0.0)
        images = []
        for tap in (used // width).unique().tolist():
            image = self.gather(x, 1, used[used // width == tap] % width, width)
            for dim, place in enumerate(divmod(tap, kernel_w)):
                start = place * dilation[dim]
                end = start + (sizes[dim] - 1) * stride[dim] + 1
                image = self.call(aten.slice.Tensor, image, dim + 2, start, end, stride[dim])
            images.append(image)
        return self.call(aten.cat.default, images, 1)

    def joined(self, parts: list[fx.Node], found: list[list[Block]], dim: int) -> fx.Node:
        """Results of the buckets, with every row in its place."""
        rows = torch.cat([_fill_rows(bucket) for bucket in found])
        y = parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, dim)
        place = torch.empty(self.packed.shape[0], dtype=torch.int64, device="cpu")
        place[rows[rows >= 0]] = (rows >= 0).nonzero()[:, 0]
        return self.gather(y, dim, place, len(rows))

    def bias_of(self, bucket: Sequence[Block], size: int) -> fx.Node | None:
        if self.bias is None:
            return None
        rows = _fill_rows(bucket)
        bias = self.bias.cpu().new_zeros(size)
        bias[rows >= 0] = self.bias.cpu()[rows[rows >= 0]]
        return self.constant("bias", bias)

    def cast(self, weight: Tensor) -> Tensor:
        return weight.to(self.like.dtype)


def _fill(bucket: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Columns [G * K] and weight [G, R, K, *taps], zeros where a block is smaller."""
    rows, columns = (max(len(getattr(b, side)) for b in bucket) for side in ("rows", "columns"))
    weight = bucket[0].weight.new_zeros(len(bucket), rows, columns, *bucket[0].weight.shape[2:])
    index = torch.empty(len(bucket), columns, dtype=torch.int64, device="cpu")
    for g, block in enumerate(bucket):
        weight[g, : len(block.rows), : len(block.columns)] = block.weight
        index[g] = torch.tensor(list(itertools.islice(itertools.cycle(block.columns.tolist()), columns)), device="cpu")
    return index.flatten(), weight


def _fill_rows(bucket: Sequence[Block]) -> Tensor:
    """Row numbers in the order of the results, -1 where zeros fill up."""
    height = max(len(b.rows) for b in bucket)
    rows = torch.full((len(bucket), height), -1, dtype=torch.int64, device="cpu")
    for g, block in enumerate(bucket):
        rows[g, : len(block.rows)] = block.rows
    return rows.flatten()
