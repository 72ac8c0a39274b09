"""Which weights write the same channels, so that a row can be removed only if all of them drop it.

Two rows of one weight are followed through the network: every operator's rule says what must stay with them, until
nothing more has to. Weights of which exactly the same rows stay number their rows alike: the convolutions that a
residual stage adds up, a depthwise convolution and the one before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxsparse.ir.capture import capture
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import aten, get_tensor
from fxsparse.ir.layout import Layout
from fxsparse.ir.masks import Masks
from fxsparse.rules import rule_of

_LAYERS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.linear.default,
)  # fmt: skip
_IDENTITY = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.alias.default,
    aten.detach.default, aten.contiguous.default, aten.clone.default, aten._native_batch_norm_legit_no_training.default,
)  # fmt: skip


def coupled_weights(model: nn.Module, example_inputs: Sequence[Tensor]) -> list[list[str]]:
    """Lists of two or more parameters whose rows are the same channels, for `refill(groups=...)`; in the graph's order.

    example_inputs  tensors, one per argument of the model's forward; a batch of one will do

    An operator without a rule ends the trail, and rows that are renumbered on their way (concatenated, shuffled between
    groups) are not coupled. The model is not changed. Raises CaptureError when torch.export cannot follow the model.
    """
    gm = capture(model, tuple(example_inputs), Masks({}), dynamic_batch=False)
    _bypass(gm)
    facts = _facts(gm, example_inputs)
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n in facts.unknown]
    weights = list(dict.fromkeys(cast(fx.Node, n.args[1]) for n in nodes if n.target in _LAYERS))
    weights = [w for w in weights if w.op == "get_attr"]
    groups: list[list[fx.Node]] = []
    for weight in weights:
        if not any(weight in group for group in groups):
            groups.append(_alike(weight, weights, nodes, facts))
    return [[str(w.target) for w in group] for group in groups if len(group) > 1]


def _alike(weight: fx.Node, weights: list[fx.Node], nodes: list[fx.Node], facts: Facts) -> list[fx.Node]:
    """The weights of which exactly the first two rows must stay when those of `weight` do."""
    layout = Layout({n: tuple(bits.shape) for n, bits in facts.unknown.items()})
    rows = torch.arange(facts.unknown[weight].shape[0], device="cpu") < 2
    layout.grow(weight, 0, rows)
    layout.spread(nodes, nodes, lambda node: rule_of(node).couple(node, facts, layout))
    return [w for w in weights if torch.equal(layout.kept[w][0], rows)]


def _bypass(gm: fx.GraphModule) -> None:
    """Take out what keeps every channel in its place: batch norms, dropout, copies."""
    for node in list(gm.graph.nodes):
        if node.target is operator.getitem and node.args[0].target in _IDENTITY:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _IDENTITY:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _facts(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Facts:
    """Every value as it is for the example; nothing is known, as nothing is to be removed."""
    facts, given = Facts(), iter(example_inputs)
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                facts.value[node] = next(given)
            elif node.op == "get_attr":
                facts.value[node] = get_tensor(gm, str(node.target))
            elif node.op == "call_function":
                facts.value[node] = _run(node, facts)
            if isinstance(facts.value.get(node), Tensor):
                facts.unknown[node] = torch.ones_like(facts.value[node], dtype=torch.bool)
    return facts


def _run(node: fx.Node, facts: Facts) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: facts.value[n])
    return cast(Callable[..., Any], node.target)(*args, **kwargs)
