"""`einsum` of two tensors as the product that it is, so that the rules of products hold for it.

Each letter is one of four: in both tensors and the result (batch), in both only (contracted), free in a, free in b.

    a [batch, free a, contracted] @ b [batch, contracted, free b] -> [batch, free a, free b], then permuted

With a stored b, and no letter of the batch in it, that is a linear layer with the weight [free b, contracted].
Left as they are: other numbers of tensors, `...`, a letter twice in a term, sums of one tensor alone, products that
contract nothing, tensors that are broadcast, and several letters of one kind where one has a symbolic size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from fxsparse.ir.graph import arg, aten, without_data

Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class Product:
    """Two tensors, their letters, those of the result, and every letter's size. If one is stored, it is b."""

    a: fx.Node
    b: fx.Node
    letters: tuple[str, str]
    out: str
    sizes: Mapping[str, Any]
    stored: bool

    @property
    def batch(self) -> str:
        """In both tensors and in the result."""
        return "".join(c for c in self.letters[0] if c in self.letters[1] and c in self.out)

    @property
    def contracted(self) -> str:
        """In both tensors, and not in the result."""
        return "".join(c for c in self.letters[0] if c in self.letters[1] and c not in self.out)

    @property
    def free(self) -> tuple[str, str]:
        """In one tensor alone."""
        a, b = self.letters
        return "".join(c for c in a if c not in b), "".join(c for c in b if c not in a)

    @property
    def is_linear(self) -> bool:
        """Whether it is a layer with the weight b."""
        return self.stored and not self.batch

    @property
    def is_plain(self) -> bool:
        """Whether it can be written as a product."""
        once = all(len({*term}) == len(term) for term in (*self.letters, self.out))
        merged = [self.contracted, self.free[1], "" if self.is_linear else self.free[0]]
        known = all(isinstance(self.sizes[letter], int) for kind in merged if len(kind) > 1 for letter in kind)
        return once and known and bool(self.contracted) and {*"".join(self.free)} <= {*self.out}


def product_of(node: fx.Node, constant: Container[fx.Node]) -> Product | None:
    """What an `einsum` is a product of; None where it is left as it is."""
    tensors = cast("list[fx.Node]", arg(node, "tensors"))
    left, arrow, out = arg(node, "equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if len(tensors) != 2 or "." in left:
        return None
    if not arrow:
        out = "".join(sorted(letter for letter in {*left} - {","} if left.count(letter) == 1))
    sizes: dict[str, Any] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, size in zip(term, tensor.meta["val"].shape, strict=True):
            if str(sizes.setdefault(letter, size)) != str(size):
                return None
    if tensors[0] in constant:  # b times a is the same
        tensors, terms = tensors[::-1], terms[::-1]
    found = Product(tensors[0], tensors[1], (terms[0], terms[1]), out, sizes, tensors[1] in constant)
    return found if found.is_plain else None


def write_product(gm: fx.GraphModule, node: fx.Node, product: Product) -> fx.Node | None:
    """Returns the stored tensor in its new order, which is to be computed."""

    def call(op: Any, *args: Any) -> fx.Node:
        new = gm.graph.call_function(op, args)
        new.meta.update({**node.meta, "val": op(*fx.map_arg(args, lambda n: n.meta["val"]))})
        return new

    with without_data(gm), gm.graph.inserting_before(node):
        result, b = (_linear if product.is_linear else _matmul)(call, product)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return b if product.stored and b is not product.b else None


def _linear(call: Call, product: Product) -> tuple[fx.Node, fx.Node]:
    """The result, and b in its new order."""
    free, rows = [*product.free[0]] or [""], product.free[1]
    x = _arranged(call, product.a, product.letters[0], [*free, product.contracted])
    w = _arranged(call, product.b, product.letters[1], [rows, product.contracted])
    return _taken_apart(call, call(aten.linear.default, x, w), [*free, rows], product), w


def _matmul(call: Call, product: Product) -> tuple[fx.Node, fx.Node]:
    free_a, free_b = product.free
    a = _arranged(call, product.a, product.letters[0], [*product.batch, free_a, product.contracted])
    b = _arranged(call, product.b, product.letters[1], [*product.batch, product.contracted, free_b])
    return _taken_apart(call, call(aten.matmul.default, a, b), [*product.batch, free_a, free_b], product), b


def _arranged(call: Call, x: fx.Node, letters: str, kinds: Sequence[str]) -> fx.Node:
    """One dimension for each of `kinds`, all letters of a kind merged."""
    x = _permuted(call, x, letters, "".join(kinds))
    for dim, kind in enumerate(kinds):
        if not kind:
            x = call(aten.unsqueeze.default, x, dim)
        elif len(kind) > 1:
            x = call(aten.flatten.using_ints, x, dim, dim + len(kind) - 1)
    return x


def _taken_apart(call: Call, y: fx.Node, kinds: Sequence[str], product: Product) -> fx.Node:
    """The reverse, and the letters in the order of the result."""
    letters = "".join(kinds)
    if any(len(kind) != 1 for kind in kinds):
        y = call(aten.reshape.default, y, [_size(call, product, letter) for letter in letters])
    return _permuted(call, y, letters, product.out)


def _size(call: Call, product: Product, letter: str) -> int | fx.Node:
    if isinstance(size := product.sizes[letter], int):
        return size
    owners = zip((product.a, product.b), product.letters, strict=True)
    tensor, term = next((tensor, term) for tensor, term in owners if letter in term)
    return call(aten.sym_size.int, tensor, term.index(letter))


def _permuted(call: Call, x: fx.Node, letters: str, order: str) -> fx.Node:
    return x if letters == order else call(aten.permute.default, x, [letters.index(letter) for letter in order])
