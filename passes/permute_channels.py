"""Renumber channels so that a packed weight writes its row groups in order, without a scatter.

y' = P y:  the rows of every weight that writes this numbering are permuted by P, and the columns of every weight that
reads it. Elementwise operators, pooling and depthwise convolutions do not notice. In a residual sum all branches share
one numbering: it follows the branch that writes most, and the others scatter their rows when they store.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxsparse.analysis.axes import Numbering, numberings
from fxsparse.formats import FORMATS
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import get_tensor, owner, replace_weight
from fxsparse.ir.symbols import concrete
from fxsparse.passes.choose_formats import FORMAT, GROUPS
from fxsparse.passes.context import Context


def plan(gm: fx.GraphModule, ctx: Context) -> list[Decision]:
    """One decision per numbering that has a packed writer whose groups are not in order."""
    found = numberings(gm)
    writers: dict[Numbering, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.meta.get(FORMAT) and node.op == "call_function":
            weight = cast(fx.Node, node.args[1])
            writers.setdefault(found[weight, 0], []).append(node)
            if FORMATS[node.meta[FORMAT]].reads_in_order:
                found[weight, 1].hold(f"{owner(node)} is stored by which of its columns are neighbors")
    for numbering in writers:
        if numbering.follows is not None:  # its order is another's: it cannot have one of its own, nor be given one
            numbering.hold("its channels are those of a flattened tensor")
    decisions = (_decide(numbering, nodes) for numbering, nodes in writers.items())
    return [d for d in decisions if d is not None]


def apply(gm: fx.GraphModule, decision: Decision) -> None:
    """Permute every weight of the numbering, and the groups that were found for its rows."""
    order = cast(Tensor, decision.data["order"])
    for numbering in cast("list[Numbering]", decision.data["numberings"]):
        indices = _expand(order, numbering.times)
        for node, dim in numbering.axes:
            if node.op == "get_attr":
                weight = get_tensor(gm, str(node.target))
                replace_weight(gm, node, weight.index_select(dim, indices.to(weight.device)).contiguous())
    position = _inverse(order)
    for node in cast("list[fx.Node]", decision.data["writers"]):
        node.meta[GROUPS] = [np.sort(position[rows]) for rows in node.meta[GROUPS]]


def in_order(node: fx.Node, position: NDArray[np.int64] | None = None) -> bool:
    """Whether the rows of every group follow each other, with row r at `position[r]`, or need not."""
    if FORMATS[node.meta[FORMAT]].writes_anywhere:
        return True
    groups = node.meta[GROUPS] if position is None else [np.sort(position[rows]) for rows in node.meta[GROUPS]]
    return all((np.diff(rows) == 1).all() for rows in groups)


def _decide(numbering: Numbering, writers: list[fx.Node]) -> Decision | None:
    out_of_order = [n for n in writers if not in_order(n)]
    if not out_of_order:
        return None
    leader = max((n for n in writers if not FORMATS[n.meta[FORMAT]].writes_anywhere), key=_writes)
    where, what = owner(leader), f"number {_size(numbering)} channels by the row groups of {owner(leader)}"
    if numbering.pinned or in_order(leader):
        why = numbering.pinned or "others that it is added to would have to follow"
        return Decision("permute_channels", where, f"{what}: {len(out_of_order)} scatter their rows", why, False)
    order = _order(leader, _size(numbering))
    others = [owner(n) for n in writers if not in_order(n, _inverse(order))]
    why = "nothing tells its channels apart" + (f"; {', '.join(others)} scatter their rows" if others else "")
    data = {"order": order, "numberings": [numbering, *numbering.followers], "writers": writers}
    return Decision("permute_channels", where, what, why, data=data)


def _inverse(order: Tensor) -> NDArray[np.int64]:
    return order.argsort().numpy()


def _writes(node: fx.Node) -> int:
    """Elements written for one sample."""
    return math.prod(concrete(node))


def _size(numbering: Numbering) -> int:
    node, dim = numbering.axes[0]
    return int(node.meta["val"].shape[dim])


def _order(leader: fx.Node, size: int) -> Tensor:
    """Old channel of every new one: group after group, then those that the leader does not write."""
    grouped = np.concatenate(leader.meta[GROUPS])
    rest = np.setdiff1d(np.arange(size), grouped)
    return torch.from_numpy(np.concatenate([grouped, rest]).astype(np.int64))


def _expand(order: Tensor, times: int) -> Tensor:
    return (order[:, None] * times + torch.arange(times, device="cpu")).flatten()
