"""Masks that leave no way from the input to the output: a network of constants, which is hardly what was meant."""

from __future__ import annotations

from typing import cast

from torch import fx

from fxsparse.analysis.reasons import is_layer
from fxsparse.ir.bits import some
from fxsparse.ir.decision import OUTPUT, Decision
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import weight_of

_NAMED = 3


def constant_output(gm: fx.GraphModule, facts: Facts) -> list[Decision]:
    """One refusal, with the weights that keep nothing, where no element of any output depends on an input."""
    (output,) = gm.graph.find_nodes(op="output")
    given, results = gm.graph.find_nodes(op="placeholder"), [n for n in output.all_input_nodes if n in facts.unknown]
    if not any(n in facts.unknown for n in given) or not any(facts.unknown[n].numel() for n in results):
        return []
    if any(some(facts.unknown[n]) for n in results):
        return []
    return [Decision("fold_constants", OUTPUT, "depend on the input", _why(_empty(gm)), accepted=False)]


def _empty(gm: fx.GraphModule) -> list[str]:
    """Names of the weights of layers that are all zero."""
    read = {str(cast(fx.Node, n.args[1]).target): weight_of(gm, n.args[1]) for n in filter(is_layer, gm.graph.nodes)}
    return [name for name, weight in read.items() if weight is not None and not bool(weight.any())]


def _why(names: list[str]) -> str:
    if not names:
        return "the kept weights leave no way from it to the output"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more} {'keeps' if len(names) == 1 else 'keep'} nothing"
