"""Which rule a node has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from fxsparse.ir.graph import arg, aten
from fxsparse.ir.symbols import rank_of, reads_a_size, squeezes_batch, symbolic_dims
from fxsparse.rules.movement import SIZED, Movement
from fxsparse.rules.rule import Rule

_ROOM = __name__.rpartition(".")[0] + "."


def collect(rules: Iterable[type[Rule]]) -> dict[Any, Rule]:
    """Operator -> rule. Raises ValueError when two rules claim one operator."""
    table: dict[Any, Rule] = {}
    for kind in rules:
        rule = kind()
        for op in rule.ops:
            if op in table:
                raise ValueError(f"{op} has two rules: {type(table[op]).__name__} and {kind.__name__}")
            table[op] = rule
    return table


def _all_rules(kind: type[Rule] = Rule) -> Iterable[type[Rule]]:
    for sub in kind.__subclasses__():
        if sub.__module__.startswith(_ROOM):  # a rule that a test defines is not ours
            yield sub
        yield from _all_rules(sub)


RULES = collect(_all_rules())
_DEFAULT = Rule()
# Movement along one dimension.
_ALONG = (aten.slice.Tensor, aten.select.int, aten.slice_scatter.default, aten.select_scatter.default)


def rule_of(node: fx.Node, rules: Mapping[Any, Rule] = RULES) -> Rule:
    """The rule for a node, or the default, which claims nothing.

    The default is for operators without a rule, and for results that depend on a symbolic size: the analysis looks at
    one sample, and at one size of each kind.
    """
    rule = rules.get(node.target, _DEFAULT)
    return _DEFAULT if _depends_on_size(node, rule) else rule


def _depends_on_size(node: fx.Node, rule: Rule) -> bool:
    """It reads a symbolic size (other than as a shape), or mixes positions along a dimension of such a size."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    if isinstance(rule, Movement):
        return _takes_apart(node, source)
    if rule.at_any_size:
        return reads_a_size(node)
    symbolic = symbolic_dims(source)
    if reads_a_size(node) or (symbolic and any(dim in symbolic for dim in rule.mixed(node, rank_of(source)))):
        return True
    return any(len(symbolic_dims(n)) > len(symbolic_dims(node)) for n in node.all_input_nodes)


def _takes_apart(node: fx.Node, source: fx.Node) -> bool:
    """Movement that does not treat all positions along a symbolic dimension alike: slices, and sizes as numbers."""
    if node.target is aten.channel_shuffle.default:
        return 1 in symbolic_dims(source)
    if squeezes_batch(node):  # of the one sample that is looked at it does
        return True
    if node.target in _ALONG:
        return reads_a_size(node) or arg(node, "dim") % rank_of(source) in symbolic_dims(source)
    return node.target not in SIZED and reads_a_size(node)
