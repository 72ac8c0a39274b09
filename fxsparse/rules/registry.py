"""Which rule a node has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxsparse.ir.graph import aten
from fxsparse.rules.movement import Movement
from fxsparse.rules.norms import Mixing
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


def rule_of(node: fx.Node, rules: Mapping[Any, Rule] = RULES) -> Rule:
    """The rule for a node, or the default, which claims nothing.

    The default is for operators without a rule, and for results that depend on the size of the batch: the analysis
    looks at one sample.
    """
    rule = rules.get(node.target, _DEFAULT)
    return _DEFAULT if _depends_on_batch(node, rule) else rule


def _depends_on_batch(node: fx.Node, rule: Rule) -> bool:
    """It reads a symbolic size (other than as a shape), or mixes samples: a dimension with a symbolic size is lost."""
    if isinstance(rule, Movement):
        return _takes_samples_apart(node)
    if any(isinstance(n.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool) for n in node.all_input_nodes):
        return True
    symbolic = _symbolic(node)
    if isinstance(rule, Mixing) and any(symbolic[dim] for dim in rule.dims(node, len(symbolic))):
        return True
    return any(sum(_symbolic(n)) > sum(symbolic) for n in node.all_input_nodes)


def _takes_samples_apart(node: fx.Node) -> bool:
    """Slices and selections along a symbolic dimension: of one sample they may leave nothing."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    dims = [node.args[1]] if node.target in (aten.slice.Tensor, aten.select.int) and len(node.args) > 1 else []
    symbolic = _symbolic(source)
    return any(isinstance(d, int) and symbolic[d] for d in dims)


def _symbolic(node: fx.Node) -> list[bool]:
    value = node.meta.get("val")
    return [not isinstance(size, int) for size in value.shape] if isinstance(value, torch.Tensor) else []
