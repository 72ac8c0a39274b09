"""Gathers of channels are done before the model runs, where that can be.

    act(x[p])[q]      = act(x[p[q]])             one gather instead of two
    conv(act(x[p]); W) = conv(act(x); W')        W'[:, p] = W, where p is a permutation
    act(conv(x; W))[q] = act(conv(x; W[q]))      where only this gather reads it, and no row is wanted twice

`act` is anything that treats channels alike: activations, pooling, padding and slicing of the image. Sums stop it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from fxsparse.ir.graph import arg, aten, new_weight, replace_weight, weight_of

_CHANNEL = 1
_ALIKE = (
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.silu.default, aten.gelu.default,
    aten.hardswish.default, aten.hardsigmoid.default, aten.sigmoid.default, aten.tanh.default, aten.elu.default,
    aten.leaky_relu.default, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
)  # fmt: skip


def merge_gathers(gm: fx.GraphModule) -> None:
    """Drop the gathers that their readers, or the layer before them, can do."""
    for node in list(gm.graph.nodes):
        if _is_gather(gm, node):
            _into_readers(gm, node)
    for node in list(gm.graph.nodes):
        if _is_gather(gm, node):
            _into_producer(gm, node)


def _is_gather(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it picks channels of images by a constant index."""
    if node.target is not aten.index_select.default or node.args[1] != _CHANNEL or not node.users:
        return False
    if node.meta["val"].dim() != 4:
        return False
    return weight_of(gm, node.args[2]) is not None


def _index(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    return cast(Tensor, weight_of(gm, node.args[2]))


def _passes(node: fx.Node) -> bool:
    """Whether channels go through it as they are, all treated alike."""
    if node.target is aten.constant_pad_nd.default:
        return len(cast("list[int]", node.args[1])) <= 4
    if node.target is aten.slice.Tensor:
        return int(arg(node, "dim")) > _CHANNEL
    return node.target in _ALIKE


def _into_readers(gm: fx.GraphModule, node: fx.Node) -> None:
    index, readers = _index(gm, node), _readers(gm, node)
    whole = not all(_is_gather(gm, r) for r in readers)
    if not readers or (whole and not _is_permutation(index, cast(fx.Node, node.args[0]))):
        return
    for reader in readers:
        if _is_gather(gm, reader):
            merged = new_weight(gm, reader, str(cast(fx.Node, reader.args[2]).target), index[_index(gm, reader)])
            reader.args = (reader.args[0], _CHANNEL, merged)
        else:
            weight = cast(Tensor, weight_of(gm, reader.args[1]))
            replace_weight(gm, cast(fx.Node, reader.args[1]), weight[:, index.argsort()].contiguous())
    node.replace_all_uses_with(cast(fx.Node, node.args[0]))


def _readers(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Gathers and whole convolutions behind `node`; none when something else reads it too."""
    found: list[fx.Node] = []
    for user in node.users:
        if _passes(user) and user.args[0] is node:
            behind = _readers(gm, user)
            if not behind:
                return []
            found += behind
        elif user.args[0] is node and (_is_gather(gm, user) or _is_whole_convolution(gm, user)):
            found.append(user)
        else:
            return []
    return found


def _into_producer(gm: fx.GraphModule, node: fx.Node) -> None:
    index, producer = _index(gm, node), cast(fx.Node, node.args[0])
    while _passes(producer) and len(producer.users) == 1:
        producer = cast(fx.Node, producer.args[0])
    alone = len(producer.users) == 1 and _is_whole_convolution(gm, producer)
    if not alone or len(index.unique()) != len(index):
        return
    for name in ("weight", "bias"):
        source = arg(producer, name)
        if isinstance(source, fx.Node):
            replace_weight(gm, source, cast(Tensor, weight_of(gm, source))[index].contiguous())
    node.replace_all_uses_with(cast(fx.Node, node.args[0]))


def _is_whole_convolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Without groups, its weight and bias stored for it alone."""
    if node.target is not aten.conv2d.default or arg(node, "groups") != 1:
        return False
    sources = [s for s in (node.args[1], arg(node, "bias")) if s is not None]
    return all(weight_of(gm, s) is not None and len(cast(fx.Node, s).users) == 1 for s in sources)


def _is_permutation(index: Tensor, source: fx.Node) -> bool:
    """Of all channels of `source`."""
    channels = source.meta["val"].shape[_CHANNEL]
    return torch.equal(index.sort().values, torch.arange(channels, device=index.device))
