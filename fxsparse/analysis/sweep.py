"""Sparse conditional constant propagation and liveness, per element, in one sweep each way.

Forward, `unknown`: every operator is run on 0/1 tensors (inputs all unknown, weights != 0); values of known elements
come from running it on the known values. Backward, `demanded`: the vector-Jacobian product of the same operator.
On an acyclic graph one sweep each way is the fixpoint. The batch is analysed at size 1 and other symbolic sizes at the
example's; facts say the same of all positions along them, so they hold at every size (`ir/symbols.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.ir.bits import some
from fxsparse.ir.facts import Facts, smallest
from fxsparse.ir.graph import aten, get_tensor
from fxsparse.ir.symbols import concrete, evenly, one_sample, reads_a_size, varies
from fxsparse.rules import Rule, rule_of

RuleOf = Callable[[fx.Node], Rule]
_FILLS = (aten.zeros.default, aten.ones.default, aten.full.default)


def analyze(gm: fx.GraphModule, *, known: Facts | None = None, rule_of: RuleOf = rule_of) -> Facts:
    """Facts of every tensor value of `gm`.

    known  facts of the same graph from before its weights were rewritten without changing any value: activations keep
           theirs, and only weights are read again
    """
    facts = known_values(gm, known=known, rule_of=rule_of)
    with torch.no_grad():
        _backward(gm, facts, rule_of)
    return facts


def known_values(gm: fx.GraphModule, *, known: Facts | None = None, rule_of: RuleOf = rule_of) -> Facts:
    """The forward sweep alone: facts without `demanded`."""
    facts = Facts()
    with torch.no_grad():
        for node in gm.graph.nodes:
            if known is not None and node.op != "get_attr" and node in known.value:
                _reuse(node, known, facts)
            else:
                _forward(gm, node, facts, rule_of)
    return facts


def _reuse(node: fx.Node, known: Facts, facts: Facts) -> None:
    facts.value[node] = known.value[node]
    if node in known.unknown:
        facts.unknown[node] = known.unknown[node]
    if node in known.index:
        facts.index[node] = known.index[node]
    if node in known.lines:
        facts.lines[node] = known.lines[node]


def _forward(gm: fx.GraphModule, node: fx.Node, facts: Facts, rule_of: RuleOf) -> None:
    if node.op == "placeholder":
        value = one_sample(node, torch.float64)
        facts.value[node] = value
        if isinstance(value, Tensor):
            facts.unknown[node] = torch.ones_like(value, dtype=torch.bool)
    elif node.op == "get_attr":
        weight = get_tensor(gm, str(node.target)).detach()
        facts.value[node] = (
            weight  # as it is: a copy of every weight in float64 is more than large models leave room for
        )
        facts.unknown[node] = torch.zeros((), dtype=torch.bool, device=weight.device).expand(weight.shape)
    elif node.op == "call_function":
        facts.value[node] = value = _run(node, facts)
        if isinstance(value, Tensor):
            facts.value[node] = value = _wide(value)
            _settle(node, value, facts, rule_of)
        elif isinstance(nothing := one_sample(node, torch.float64), Tensor):
            facts.value[node], facts.unknown[node] = nothing, torch.ones_like(nothing, dtype=torch.bool)


def _run(node: fx.Node, facts: Facts) -> Any:
    """Its value; None where a tensor cannot be told: without a kernel for float64, or from the bits of other floats."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), facts.operand)
    is_tensor = isinstance(node.meta.get("val"), Tensor)
    try:
        value = cast(Callable[..., Any], node.target)(*args, **kwargs)
    except Exception as error:
        own = getattr(node.target, "namespace", "aten") == "aten" and not isinstance(error, RuntimeError)
        if not is_tensor or own:  # an operator of the user's may raise what it likes
            raise
        return None
    return value if not is_tensor or list(value.shape) == concrete(node) else None


def _settle(node: fx.Node, value: Tensor, facts: Facts, rule_of: RuleOf) -> None:
    """Unknown bits by the rule. A value is no fact that is not finite, or differs along a symbolic dimension.

    Unknown elements hold 0.
    """
    tainted = any(n in facts.unknown for n in node.all_input_nodes) or node.target is operator.getitem
    unknown = torch.full_like(value, not tainted and _counts(node), dtype=torch.bool)
    if tainted:
        unknown = rule_of(node).unknown(node, facts)
    if value.is_floating_point() and not _finite(node, value.abs().sum()):
        unknown = unknown | ~_finite(node, value)
    unknown = evenly(node, unknown)
    if (differs := varies(node, value)) is not None:
        unknown = unknown | differs
    facts.unknown[node] = _compact(unknown)
    facts.value[node] = _compact(value.masked_fill(unknown, 0) if some(unknown) else value)


def _finite(node: fx.Node, value: Tensor) -> Tensor:
    """Bool: which elements are finite, and stay so in the node's own dtype."""
    own = node.meta.get("val", value)
    return (value.to(own.dtype) if own.is_floating_point() else value).isfinite()


def _compact(tensor: Tensor) -> Tensor:
    """The same in less memory: most facts are of channels, and one position speaks for all."""
    small = smallest(tensor)
    return tensor if small is tensor else small.clone().expand(tensor.shape)


def _counts(node: fx.Node) -> bool:
    """It makes a tensor from a symbolic size that is more than its shape: arange, and full of the size itself."""
    fills = node.target in _FILLS and not any(isinstance(a, fx.Node) for a in node.args[1:])
    return reads_a_size(node) and not fills


def _backward(gm: fx.GraphModule, facts: Facts, rule_of: RuleOf) -> None:
    facts.demanded = {n: torch.zeros_like(bits) for n, bits in facts.unknown.items()}
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            _ask(facts, {n: torch.ones_like(facts.unknown[n]) for n in node.all_input_nodes if n in facts.unknown})
        elif node.op == "call_function":
            _ask(facts, _asked(node, facts, rule_of))


def _asked(node: fx.Node, facts: Facts, rule_of: RuleOf) -> Mapping[fx.Node, Tensor]:
    demanded = facts.demanded.get(node)
    if demanded is None:  # a tuple or a number: what is asked of it is not tracked, so all of its inputs are needed
        return Rule().demand(node, facts, torch.empty(0)) if isinstance(facts.value[node], (tuple, list)) else {}
    if not demanded.numel():  # one sample leaves nothing here; more may
        return Rule().demand(node, facts, demanded)
    return rule_of(node).demand(node, facts, demanded) if some(demanded) else {}


def _ask(facts: Facts, demands: Mapping[fx.Node, Tensor]) -> None:
    for n, bits in demands.items():
        if n in facts.demanded:
            facts.demanded[n] |= evenly(n, bits)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
