"""Which indices of every dimension of every value are kept.

Keeping an index that nobody needs is always exact, so a layout only ever grows: rules add what an operator needs, and
the smallest layout that satisfies all of them is the one to cut to.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, fx

from fxsparse.ir.bits import any_along, some
from fxsparse.ir.union_find import UnionFind

Space = list[tuple[fx.Node, int]]  # dimensions with one numbering
NEEDED = 0  # the cause of an index that some output really depends on


def around(grown: Iterable[fx.Node]) -> set[fx.Node]:
    """The operators whose rules look at any of these: a rule looks at its node and at what that reads."""
    return {n for node in grown for n in (node, *node.users) if n.op == "call_function"}


class Layout:
    """Kept indices per (node, dimension), and why each one is kept.

    kept    bool [size] per dimension, True = kept
    cause   int64 [size] per dimension, position in `causes` of what first asked for the index
    grown   the nodes that kept more since somebody last emptied it; a set that keeps its order
    """

    def __init__(self, shapes: Mapping[fx.Node, Iterable[int]]) -> None:
        self.kept = {n: [_empty(size, torch.bool) for size in shape] for n, shape in shapes.items()}
        self.cause = {n: [_empty(len(k), torch.int64) for k in kept] for n, kept in self.kept.items()}
        self.causes = ["needed"]
        self.tied: dict[tuple[tuple[fx.Node, int], tuple[fx.Node, int]], None] = {}  # a set that keeps its order
        self.grown: dict[fx.Node, None] = {}

    def clone(self) -> Layout:
        """One that grows by itself."""
        own = Layout({})
        own.kept = {n: list(kept) for n, kept in self.kept.items()}
        own.cause = {n: list(cause) for n, cause in self.cause.items()}
        own.causes, own.tied, own.grown = list(self.causes), dict(self.tied), dict(self.grown)
        return own

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes before cutting."""
        return tuple(len(k) for k in self.kept[node])

    def new_shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes after cutting."""
        return tuple(int(k.sum()) for k in self.kept[node])

    def full(self, node: fx.Node, dim: int) -> bool:
        """Whether nothing is cut from this dimension."""
        return bool(self.kept[node][dim].all())

    def indices(self, node: fx.Node, dim: int) -> Tensor:
        """The kept indices, int64, ascending."""
        return self.kept[node][dim].nonzero().flatten()

    def grow(self, node: fx.Node, dim: int, mask: Tensor, cause: int | Tensor | str = NEEDED) -> None:
        """Keep the indices in `mask` too (bool [size])."""
        new = mask.to("cpu") & ~self.kept[node][dim]
        if not new.any():
            return
        if isinstance(cause, str):
            cause = self._number(cause)
        # tensors of their own: clones share them
        self.kept[node][dim] = self.kept[node][dim] | new
        self.cause[node][dim] = torch.where(new, torch.as_tensor(cause, device="cpu"), self.cause[node][dim])
        self.grown[node] = None

    def pin(self, node: fx.Node, cause: str, dims: Iterable[int] | None = None) -> None:
        """Keep everything along `dims` (all dimensions by default)."""
        for dim in range(len(self.kept[node])) if dims is None else dims:
            self.grow(node, dim, torch.ones_like(self.kept[node][dim]), cause)

    def tie(self, a: fx.Node, dim_a: int, b: fx.Node, dim_b: int, cause: str) -> None:
        """The two dimensions have the same kept indices. What one gives the other keeps its cause."""
        dim_a, dim_b = dim_a % len(self.kept[a]), dim_b % len(self.kept[b])
        self.tied[(a, dim_a), (b, dim_b)] = None
        for source, i, target, j in ((a, dim_a, b, dim_b), (b, dim_b, a, dim_a)):
            if bool((self.kept[source][i] & ~self.kept[target][j]).any()):
                self.grow(target, j, self.kept[source][i], self._inherit(source, i, cause))

    def spread(
        self, nodes: Sequence[fx.Node], waiting: Iterable[fx.Node], couple: Callable[[fx.Node], None]
    ) -> set[fx.Node]:
        """Call `couple` for all of `nodes` that are waiting, and for those around which something grew, until none is.

        Sweeps go backwards and forwards. Returns what it was called for.
        """
        order, called, every = [*reversed(nodes), *nodes], set[fx.Node](), set(nodes)
        waiting = every.intersection(waiting)
        while waiting:
            for node in order:
                if node in waiting:
                    waiting.discard(node)
                    self.grown.clear()
                    couple(node)
                    called.add(node)
                    waiting |= around(self.grown) & every
        return called

    def rectangle(self, node: fx.Node, through: Container[int] = ()) -> Tensor:
        """The elements that stay, bool of the node's shape; along dimensions in `through` only whether any does."""
        mask = torch.ones((), dtype=torch.bool, device="cpu")
        for dim, kept in enumerate(self.kept[node]):
            bits = any_along(kept, 0, keepdim=True) if dim in through else kept
            mask = mask & bits.view([-1 if d == dim else 1 for d in range(len(self.kept[node]))])
        return mask

    def grow_elements(
        self, node: fx.Node, elements: Tensor, cause: str, like: Mapping[int, Tensor] = MappingProxyType({})
    ) -> None:
        """Keep the smallest rectangle that holds `elements` (bool of the node's full shape).

        like  what to keep where `elements` has one position for a whole dimension
        """
        if not some(elements):
            return
        for dim in range(elements.dim()):
            others = [d for d in range(elements.dim()) if d != dim]
            self.grow(node, dim, like[dim] if dim in like else any_along(elements, others), cause)

    def why(self, node: fx.Node, dim: int, among: Tensor | None = None) -> dict[str, int]:
        """How many indices (of those in `among`, bool [size]) are kept for each cause other than being needed."""
        kept, cause = self.kept[node][dim], self.cause[node][dim]
        kept = kept if among is None else kept & among
        numbers, counts = cause[kept & (cause != NEEDED)].unique(return_counts=True)
        return {self.causes[n]: c for n, c in zip(numbers.tolist(), counts.tolist(), strict=True)}

    def spaces(self) -> list[Space]:
        """Dimensions forced to share one channel numbering, grouped; groups and members in the graph's own order.

        Nodes hash by identity: from a set of them the groups would come in another order every time.
        """
        tied: UnionFind[tuple[fx.Node, int]] = UnionFind()
        for first, second in self.tied:
            tied.unite(second, first)
        groups: dict[tuple[fx.Node, int], Space] = {}
        for member in ((node, dim) for node, kept in self.kept.items() for dim in range(len(kept))):
            if member in tied:
                groups.setdefault(tied.root(member), []).append(member)
        return list(groups.values())

    def _inherit(self, node: fx.Node, dim: int, cause: str) -> Tensor:
        own = self.cause[node][dim]
        return torch.where(own == NEEDED, self._number(cause), own) if cause else own

    def _number(self, cause: str) -> int:
        if not cause:
            return NEEDED
        if cause not in self.causes:
            self.causes.append(cause)
        return self.causes.index(cause)


def _empty(size: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(size, dtype=dtype, device="cpu")  # layouts are small, whatever the default device is
