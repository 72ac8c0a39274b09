"""Every rule, on its own samples, against brute force: what it knows, what nobody needs, and the cut.

A rule is wrong when a known element moves, when noise in an undemanded element reaches the output, or when the cut
graph computes something else. Each of the three is looked for on every sample under several patterns of zeros.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxsparse.analysis.closure import smallest_layout
from fxsparse.analysis.reasons import is_layer
from fxsparse.analysis.sweep import analyze
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.ir.capture import capture
from fxsparse.ir.facts import Facts
from fxsparse.ir.graph import aten, clone, erase_unused, get_tensor, refresh
from fxsparse.ir.masks import Masks
from fxsparse.passes import PIPELINE, Context, canonicalize, lower_formats, permute_channels, run
from fxsparse.passes.choose_formats import FORMAT, GROUPS
from fxsparse.rules import RULES, Rule, Sample, collect, rule_of
from fxsparse.rules.contraction import Convolution
from fxsparse.rules.elementwise import Elementwise, Multiply
from fxsparse.rules.norms import LayerNorm
from tests.wrap import Wrapped, interpret

SAMPLES = [(type(rule).__name__, i, s) for rule in dict.fromkeys(RULES.values()) for i, s in enumerate(rule.samples())]
SEEDS = range(4)


class WrongRuleError(AssertionError):
    """A claim of a rule that brute force refutes."""


def wrapped_graph(sample: Sample, seed: int) -> tuple[Wrapped, fx.GraphModule, tuple]:
    model = Wrapped(sample, seed).eval()
    inputs = model.inputs(sample.shapes, seed)
    gm = capture(model, inputs, Masks(), dynamic_batch=True)
    run(gm, [canonicalize], Context())
    return model, gm, inputs


def check_facts(gm: fx.GraphModule, facts: Facts, model: Wrapped, sample: Sample) -> None:
    """Known elements keep their value under other inputs; noise where nothing is demanded does not reach the output."""
    for seed in (100, 101):
        inputs = model.inputs(sample.shapes, seed)
        values = interpret(gm, inputs, {})
        for node, unknown in facts.unknown.items():
            if node.op == "call_function" and not unknown.all():
                claimed, real = facts.value[node][~unknown], values[node][:1][~unknown]
                if not torch.allclose(claimed.double(), real.double(), rtol=1e-9, atol=1e-12):
                    raise WrongRuleError(f"{node.format_node()} is not what it was said to be")
        change = {
            n: lambda v, b=bits: torch.where(b, v, v + torch.randn_like(v))
            for n, bits in facts.demanded.items()
            if n.op == "call_function" and facts.value[n].is_floating_point() and not bits.all()
        }
        for node in change:
            output = [*interpret(gm, inputs, {node: change[node]}).values()][-1][0]
            if not torch.allclose(output, [*values.values()][-1][0], rtol=1e-9, atol=1e-12):
                raise WrongRuleError(f"noise in undemanded elements of {node.format_node()} reached the output")


@pytest.mark.parametrize(("name", "i", "sample"), SAMPLES, ids=[f"{n}-{i}" for n, i, _ in SAMPLES])
def test_facts_hold_under_brute_force(name: str, i: int, sample: Sample) -> None:
    for seed in SEEDS:
        model, gm, _ = wrapped_graph(sample, seed)
        check_facts(gm, analyze(gm), model, sample)


@pytest.mark.parametrize(("name", "i", "sample"), SAMPLES, ids=[f"{n}-{i}" for n, i, _ in SAMPLES])
def test_cut_graphs_compute_the_same_and_are_cut_no_further(name: str, i: int, sample: Sample) -> None:
    for seed in SEEDS:
        model, gm, _ = wrapped_graph(sample, seed)
        run(gm, PIPELINE, Context())
        for batch_seed in (7, 8):
            xs = model.inputs(tuple((batch_seed - 6, *s[1:]) for s in sample.shapes), batch_seed)
            torch.testing.assert_close(gm(*xs), model(*xs), rtol=1e-10, atol=1e-10)
        again = [d for step in PIPELINE for d in step.plan(gm, Context()) if d.accepted]
        assert again == []


@pytest.mark.parametrize(("name", "i", "sample"), SAMPLES, ids=[f"{n}-{i}" for n, i, _ in SAMPLES])
def test_channels_that_blocks_want_in_another_order_compute_the_same(name: str, i: int, sample: Sample) -> None:
    for seed in SEEDS:
        model, gm, xs = wrapped_graph(sample, seed)
        for x in gm.graph.find_nodes(op="placeholder"):
            for layer in (n for n in x.users if is_layer(n)):  # its even rows in one group, the odd ones in another
                rows = np.arange(layer.args[1].meta["val"].shape[0])
                layer.meta |= {FORMAT: "shuffled_block", GROUPS: [rows[::2], rows[1::2]]}
        run(gm, [permute_channels, lower_formats], Context())
        assert any(n.target is shuffled_block for n in gm.graph.nodes)
        torch.testing.assert_close(gm(*xs), model(*xs), rtol=1e-10, atol=1e-10)


def test_every_rule_has_samples() -> None:
    assert {type(rule).__name__ for rule in RULES.values() if not list(rule.samples())} == set()


def test_an_operator_without_a_rule_claims_nothing_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
            with torch.no_grad():
                self.a.weight[:3] = 0
                self.a.bias[:3] = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.special.bessel_j0(self.a(x)))

    model = Odd().eval()
    gm = capture(model, (torch.randn(2, 6).double(),), Masks(), dynamic_batch=True)
    ctx = Context()
    plan = run(gm, PIPELINE, ctx)
    assert aten.special_bessel_j0.default not in RULES
    assert gm.get_buffer("a.weight").shape == (6, 6)
    assert any("special_bessel_j0" in d.why and "has no rule" in d.why for d in plan.refused)


LEAKY_RELU = '''
"""y = x for x > 0, slope * x otherwise: elementwise."""
from fxsparse.ir.graph import aten
from fxsparse.rules.elementwise import Elementwise
from fxsparse.rules.rule import Sample
import torch.nn.functional as F


class LeakyRelu(Elementwise):
    """leaky_relu, in one file."""

    ops = (aten.leaky_relu.default,)

    def samples(self):
        yield Sample(lambda x: F.leaky_relu(x, 0.1), ((2, 5, 3, 3),))
'''


def test_a_stranger_adds_leaky_relu_in_one_file(tmp_path: Path) -> None:
    others = {op: rule for op, rule in RULES.items() if op is not aten.leaky_relu.default}  # as if it were not there
    path = tmp_path / "leaky_relu.py"
    path.write_text(LEAKY_RELU)
    spec = importlib.util.spec_from_file_location("leaky_relu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rules = {**others, **collect([module.LeakyRelu])}
    (sample,) = module.LeakyRelu().samples()
    model, gm, _ = wrapped_graph(sample, 0)
    with_rule = analyze(gm, rule_of=lambda n: rule_of(n, rules))
    check_facts(gm, with_rule, model, sample)
    kept = smallest_layout(gm, with_rule, rule_of=lambda n: rule_of(n, rules)).new_shape
    leaky = next(n for n in gm.graph.nodes if n.target is aten.leaky_relu.default)
    no_rule = analyze(gm, rule_of=lambda n: rule_of(n, others))
    without = smallest_layout(gm, no_rule, rule_of=lambda n: rule_of(n, others)).new_shape
    assert kept(leaky)[1] < without(leaky)[1] == 5


class ForgetsTheOtherOperand(Elementwise):
    def unknown(self, node, facts):
        return facts.unknown[node.args[0]].expand_as(facts.value[node])


class KnowsNormsByElement(LayerNorm):
    def unknown(self, node, facts):
        return facts.unknown[node.args[0]]


class IgnoresTheBorder(Convolution):
    def demand(self, node, facts, demanded):
        first = demanded.clone()
        first[..., 0] = False
        return super().demand(node, facts, first)


class DropsAFactor(Multiply):
    def demand(self, node, facts, demanded):
        a, b = node.args
        return {a: demanded, b: torch.zeros_like(facts.unknown[b])}


@pytest.mark.parametrize(
    ("wrong", "op"),
    [
        (ForgetsTheOtherOperand, aten.add.Tensor),
        (KnowsNormsByElement, aten.layer_norm.default),
        (IgnoresTheBorder, aten.conv2d.default),
        (DropsAFactor, aten.mul.Tensor),
    ],
)
def test_a_wrong_rule_is_caught(wrong: type[Rule], op: object) -> None:
    rules = {**RULES, op: wrong()}
    right = RULES[op]

    def check_all() -> None:
        for sample in right.samples():
            for seed in SEEDS:
                model, gm, _ = wrapped_graph(sample, seed)
                check_facts(gm, analyze(gm, rule_of=lambda n: rule_of(n, rules)), model, sample)

    with pytest.raises(WrongRuleError):
        check_all()


def test_two_rules_for_one_operator_are_refused() -> None:
    with pytest.raises(ValueError, match=r"aten.relu.default has two rules: Elementwise and Forgets"):
        collect([Elementwise, ForgetsTheOtherOperand])


def test_a_clone_and_a_refresh_leave_the_graph_as_it_was() -> None:
    model, gm, inputs = wrapped_graph(SAMPLES[0][2], 0)
    copy = clone(gm)
    refresh(copy)
    erase_unused(copy)
    assert [n.format_node() for n in copy.graph.nodes] == [n.format_node() for n in gm.graph.nodes]
    torch.testing.assert_close(copy(*inputs), model(*inputs))


def test_facts_take_the_memory_of_what_differs_in_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    weight = model.get_parameter("0.weight")
    masks = Masks({"0.weight": (torch.arange(64) < 40).view(-1, 1, 1, 1).expand_as(weight)})
    gm = capture(model, (torch.randn(1, 3, 32, 32),), masks, dynamic_batch=True)
    facts = analyze(gm)
    assert not facts.unknown[next(n for n in gm.graph.nodes if n.target is aten.relu.default)][:, 40:].any()
    for node in gm.graph.nodes:
        if node.op == "call_function":
            sizes = [facts.value[node].untyped_storage().nbytes(), facts.unknown[node].untyped_storage().nbytes()]
            assert sizes[0] <= 64 * 8, node
            assert sizes[1] <= 64, node
        elif node.op == "get_attr" and facts.value[node].shape == weight.shape:
            assert facts.value[node].data_ptr() == get_tensor(gm, str(node.target)).data_ptr()
