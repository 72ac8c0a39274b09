"""torch.compile(model, backend="fxsparse"): the same result as `compile`, whatever TorchDynamo does around it."""

import copy
import gc
import logging
import os
import re
import subprocess
import sys
import threading
import tomllib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxsparse
from fxsparse import InputError, MaskError, Masks, Report, TargetError, VerificationError
from fxsparse.dynamo import backend
from fxsparse.dynamo.seen import Seen
from fxsparse.ir.graph import get_tensor, set_tensor
from fxsparse.passes import shrink_channels
from tools.decoder import DecodeStep
from tools.transformer_recipes import heads_and_neurons

ROOT = Path(__file__).parents[1]
POINT = "fxsparse.dynamo:backend"
if "fxsparse" not in torch._dynamo.list_backends():  # an installed fxsparse has its entry point
    torch._dynamo.register_backend(backend, "fxsparse")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """A convolution, batch norm, two linear layers and a residual sum; `between` runs in the middle of it."""

    def __init__(self, between: Any = lambda net, x: x) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.a, self.b, self.between = nn.Linear(16, 32), nn.Linear(32, 16), between
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.c(x))).mean((2, 3))
        x = self.between(self, x)
        return x + self.b(torch.relu(self.a(x)))


class Compiled:
    """torch.compile with this back end, and the reports it gave."""

    def __init__(self, function: Any, masks: Any = None, /, *, dynamic: bool | None = None, **options: Any) -> None:
        self.reports: list[Report] = []
        given = {"target": "eager", "measure": False, "on_report": self.reports.append, **options}
        given |= {"masks": masks} if masks is not None else {}
        self.call = torch.compile(function, backend="fxsparse", options=given, dynamic=dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.call(*args, **kwargs)

    def rows(self) -> list[dict[str, int]]:
        return [{r.name: r.rows_removed for r in report.rows if r.rows_removed} for report in self.reports]


def half(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """Every second row of these layers, or of all convolutions and linear layers but the last."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    masks = {}
    for name in names or layers[:-1]:
        mask = torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool)
        mask[::2] = False
        masks[f"{name}.weight"] = mask
    return masks


def exact(model: nn.Module, masks: Mapping[str, Tensor], *args: Tensor) -> Tensor:
    """The masked model, in float64."""
    wide = copy.deepcopy(model).double()
    Masks(masks).apply_(wide)
    with torch.no_grad():
        return wide(*[x.double() for x in args])


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same_as_compile(model: nn.Module, masks: Any, *args: Tensor, **options: Any) -> Tensor:
    """Both entrances: the same rows, columns and formats, and the very same outputs."""
    ours = Compiled(model, masks, **options)
    y = ours(*args)
    theirs = fxsparse.compile(model, masks, "eager", example_inputs=args, measure=False, **options)
    (report,) = ours.reports
    names = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}  # of a tied one, either
    seen = [
        [(names[r.name], r.new_shape, r.columns_removed, r.stored) for r in x.rows] for x in (report, theirs.report)
    ]
    assert seen[0] == seen[1]
    assert any(r.rows_removed for r in report.rows)
    torch.testing.assert_close(y, theirs(*args), rtol=1e-5, atol=1e-5)
    return y


# the same as compile


SMALL = {
    "resnet18": lambda v: v.resnet.ResNet(v.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "resnet50": lambda v: v.resnet.ResNet(v.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10),
    "mobilenet_v2": lambda v: v.mobilenet_v2(width_mult=0.5, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_a_torchvision_model_is_rewritten_as_compile_does(make: Any) -> None:
    """Their blocks, each once; tests/test_models.py has the whole models of the other entrance."""
    model = make(pytest.importorskip("torchvision").models).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    same_as_compile(model, half(model, *names[1::3]), torch.randn(1, 3, 32, 32))


def test_a_vision_transformer_is_rewritten_as_compile_does() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=10).eval()
    mlps = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("mlp.0")]
    y = same_as_compile(model, half(model, *mlps), x := torch.randn(2, 3, 32, 32))
    agree(y, exact(model, half(model, *mlps), x))


@pytest.mark.parametrize("formats", ["shuffled_block", "unstructured"])
def test_formats_are_chosen_as_compile_does(formats: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32, :16] = mask[32:, 40:60] = True
    mask[:4] = False
    same_as_compile(model, {"0.weight": mask}, torch.randn(3, 64), formats=formats)


def test_the_contest_and_inductor_serve_this_entrance_too() -> None:
    model, masks = Net(), half(Net(), "a")
    ours = Compiled(model, masks, target="inductor", measure=True)
    agree(ours(X), exact(model, masks, X))
    (report,) = ours.reports
    assert report.target == "inductor"
    assert report.dense_ms is not None
    assert len(report.timings) == 5
    assert report.verification.startswith("largest |difference|")


def test_auto_serves_this_entrance_too() -> None:
    model, masks = Net(), half(Net(), "a")
    ours = Compiled(model, masks, target="auto", measure=True)
    for x in (X, X[:1], X):
        agree(ours(x), exact(model, masks, x))
    assert ours.reports[0].target == "auto"
    assert [d.what for d in ours.reports[0].decisions if d.step == "contest" and d.accepted]


def test_a_pass_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = shrink_channels.apply

    def wrong(gm: Any, decision: Any) -> None:
        apply(gm, decision)
        if "indices" in decision.data:
            name = decision.data["node"].target
            set_tensor(gm, name, get_tensor(gm, name) * 1.01)

    monkeypatch.setattr(shrink_channels, "apply", wrong)
    with pytest.raises(VerificationError, match="rewritten graph"):
        Compiled(Net(), half(Net(), "a"))(X)


def test_a_front_end_that_changes_the_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsparse.dynamo.graph.Graph._own", lambda self, full, inputs, leaves: [torch.zeros(2, 16)])
    with pytest.raises(VerificationError, match="captured graph"):
        Compiled(Net(), half(Net(), "a"))(X)


def llama() -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model, half(model, *[f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")])


def decoded(cache: Callable[[Any], Any], steps: int) -> tuple[Compiled, list[Any]]:
    """A llama compiled and as it is, each with a cache: the prompt, then one token at a time, the same logits."""
    model, masks = llama()
    ours = Compiled(model, masks)
    Masks(masks).apply_(reference := copy.deepcopy(model))
    caches = [cache(model.config) for _ in range(2)]
    tokens = torch.randint(0, 64, (1, 5))
    for _ in range(steps):
        y = ours(tokens, past_key_values=caches[0]).logits
        with torch.no_grad():
            agree(y, reference(tokens, past_key_values=caches[1]).logits)
        tokens = y[:, -1:].argmax(-1)
    return ours, caches


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.m(tokens, use_cache=False).logits


def test_a_llama_is_rewritten_as_compile_does() -> None:
    model, masks = llama()
    tokens = torch.randint(0, 64, (1, 5))
    same_as_compile(Logits(model), {f"m.{n}": m for n, m in masks.items()}, tokens)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_decoding_step_is_rewritten_as_compile_does() -> None:
    """A token and a cache go in. Hidden neurons go; heads, whose keys the cache still holds, stay."""
    pytest.importorskip("transformers")
    step = DecodeStep(layers=1).eval()
    masks = heads_and_neurons(step, sparsity=0.5, seed=0)
    kept = {name.split(".")[-2]: mask.double().mean().item() for name, mask in masks.items()}
    assert kept == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], 0.5)
    same_as_compile(step, masks, *step.example_inputs(2))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # its new name is not in 5.0
def test_a_llama_decodes_with_its_cache() -> None:
    StaticCache = pytest.importorskip("transformers").StaticCache

    ours, caches = decoded(lambda config: StaticCache(config=config, max_cache_len=12), 3)
    torch.testing.assert_close(caches[0].layers[0].keys, caches[1].layers[0].keys)
    assert [len(rows) for rows in ours.rows()] == [2, 2]


# which masks


def test_masks_come_as_a_dict_as_masks_or_as_a_path(tmp_path: Path) -> None:
    masks = half(Net(), "a")
    Masks(masks).save(path := tmp_path / "masks.safetensors")
    for given in (masks, Masks(masks), path, str(path)):
        torch._dynamo.reset()
        ours = Compiled(model := Net(), given)
        agree(ours(X), exact(model, masks, X))
        assert ours.rows() == [{"a.weight": 16}]


def test_zeros_of_a_buffer_in_a_checkpoint_are_no_mask(tmp_path: Path) -> None:
    model = Net()
    Masks(half(model, "a")).apply_(model)
    model.register_buffer("table", torch.eye(3))
    torch.save(model.state_dict(), path := tmp_path / "net.pt")
    ours = Compiled(model, path)
    agree(ours(X), exact(model, {}, X))
    assert ours.rows() == [{"a.weight": 16}]


def test_weights_that_are_left_in_a_checkpoint_are_told_once(tmp_path: Path) -> None:
    pruned, model = Net(), Net()
    Masks(half(pruned, "a")).apply_(pruned)
    with torch.no_grad():
        pruned.a.weight.mul_(2)
    torch.save(pruned.state_dict(), path := tmp_path / "net.pt")
    ours = Compiled(model, path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in (X, torch.cat([X, X, X])):
            agree(ours(x), exact(model, half(model, "a"), x))
    assert len([w for w in told if "its weights are not, and the model has others" in str(w.message)]) == 1


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_masks_of_recurrent_layers_hold_where_dynamo_compiles_them(kind: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = kind(16, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.cell(x)[0])

    masks = {"cell.weight_ih_l0": torch.zeros(len(Recurrent().cell.weight_ih_l0), 16, dtype=torch.bool)}
    x = torch.randn(2, 5, 16)
    with torch._dynamo.config.patch(allow_rnn=True):
        ours = Compiled(model := Recurrent(), masks)
        agree(ours(x), exact(model, masks, x))


def test_masks_come_from_zeros_and_from_torch_prune() -> None:
    model = Net()
    Masks(half(model, "a")).apply_(model)
    ours = Compiled(model)
    agree(ours(X), exact(model, {}, X))
    assert ours.rows() == [{"a.weight": 16}]
    torch._dynamo.reset()
    model = Net()
    prune.random_structured(model.a, "weight", 0.5, dim=0)
    ours = Compiled(model)
    agree(ours(X), model(X))
    assert ours.rows() == [{"a.weight": 16}]
    assert [r.name for r in fxsparse.plan(model, None, (X,)).rows] == [r.name for r in ours.reports[0].rows]


def test_parameters_are_told_by_identity_not_by_order_or_frame() -> None:
    inner = Net(lambda net, x: torch._dynamo.graph_break() or x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner = nn.Linear(8, 8), inner  # `a.weight` of the inner frame is another one

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1):  # dynamo gives up on this frame, and begins with the inner one
                x = self.inner(self.a(x))
            return x

    model = Outer().eval()
    masks = half(model, "inner.a")
    Masks(masks).apply_(model)
    ours = Compiled(model, masks)
    agree(ours(X), exact(model, masks, X))
    assert [rows for rows in ours.rows() if rows] == [{"inner.a.weight": 16}]


def test_every_way_to_call_torch_compile_knows_its_module() -> None:
    masks, options = half(Net(), "a"), {"target": "eager", "measure": False, "verify": "off"}

    class Decorated(Net):
        forward = torch.compile(Net.forward, backend="fxsparse", options={**options, "masks": masks})

    in_place, method, decorated = Net(), Net(), Decorated()
    in_place.compile(backend="fxsparse", options={**options, "masks": masks})
    method.forward = torch.compile(method.forward, backend="fxsparse", options={**options, "masks": masks})
    for model in (in_place, method, decorated):
        plain = Net()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            agree(model(X), exact(plain, masks, X))


def test_a_tied_weight_may_carry_any_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.o = nn.Embedding(12, 8), nn.Linear(8, 16), nn.Linear(8, 12, bias=False)
            self.b = nn.Linear(16, 8)
            self.o.weight = self.e.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.b(torch.relu(self.a(self.e(x)))))

    model = Tied().eval()
    masks = {"o.weight": torch.rand(12, 8) > 0.5, **half(model, "a")}
    ours = Compiled(model, masks)
    y = ours(x := torch.arange(6).reshape(2, 3))
    Masks(masks).apply_(model)
    agree(y, model(x))
    assert ours.rows() == [{"a.weight": 8}]


def refused_until_applied(model: nn.Module, masks: dict[str, Tensor], message: str) -> Compiled:
    """What compiles once the weights themselves are zero where they are masked."""
    with pytest.raises(InputError, match=message):
        Compiled(model, masks)(X)
    Masks(masks).apply_(model)
    torch._dynamo.reset()
    ours = Compiled(model, masks)
    agree(ours(X), exact(model, masks, X))
    return ours


def test_a_mask_of_a_parameter_that_no_graph_uses_does_no_harm() -> None:
    model = Net()
    model.aux = nn.Linear(4, 4)
    masks = half(model, "a", "aux")
    ours = refused_until_applied(model, masks, r"'aux.weight': expected a weight that is zero where it is masked")
    assert ours.rows() == [{"a.weight": 16}]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mask": {}}, InputError, r"options\['mask'\] .* expected one of masks, model, .*\n  Did you mean 'masks'"),
        ({"masks": {"aa.weight": torch.ones(32, 16)}}, MaskError, "Did you mean 'a.weight'"),
        ({"masks": {"a.weight": torch.ones(3, 16)}}, MaskError, r"shape \(32, 16\); got \(3, 16\)"),
        ({"masks": 3}, InputError, "masks: expected Masks, a dict"),
        ({"target": "fpga"}, TargetError, "target 'fpga'"),
        ({"formats": "csr"}, InputError, "formats='csr'"),
        ({"model": 3}, InputError, r"options\['model'\]: expected a torch.nn.Module"),
        ({"on_report": 3}, InputError, r"options\['on_report'\]: expected a function"),
    ],
)
def test_a_wrong_option_is_an_error_at_the_call(options: dict[str, Any], error: type[Exception], text: str) -> None:
    # where there is a graph break, dynamo takes an error of its back end for another one, and runs the model as it is
    for between in (lambda net, x: x, lambda net, x: torch._dynamo.graph_break() or x):
        torch._dynamo.reset()
        for _ in range(2):
            with pytest.raises(error, match=text):
                Compiled(Net(between), **options)(X)


def test_a_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"mode='max-autotune' of torch.compile: expected none"), torch.no_grad():
        torch.compile(Net(), backend="fxsparse", mode="max-autotune")(X)


def test_a_function_needs_to_say_whose_names_the_masks_use() -> None:
    model = Net()
    masks = half(model, "a")
    with pytest.raises(InputError, match=r"expected torch.compile called on a module; got a function"):
        Compiled(lambda x: model(x) * 1, masks)(X)
    ours = Compiled(lambda x: model(x) * 1, masks, model=model)
    agree(ours(X), exact(model, masks, X))
    assert ours.rows() == [{"a.weight": 16}]


def test_two_models_of_one_class_have_their_own_weights_and_masks() -> None:
    first, second, reports = Net(), Net(), []
    options = {"masks": half(first, "a"), "target": "eager", "measure": False, "on_report": reports.append}
    others = {**options, "masks": half(second, "b")}  # torch compares the two: tensors under the same names must not be
    again = {**options, "masks": half(second, "b")}
    calls = [(first, "a", options), (second, "a", options), (second, "b", others), (second, "b", again)]
    compiled = [(torch.compile(m, backend="fxsparse", options=o), m, name) for m, name, o in calls]
    for _ in range(2):
        for call, model, name in compiled:
            with torch.no_grad():
                agree(call(X), exact(model, half(model, name), X))
    assert len(reports) == 4


def test_a_tensor_in_the_same_memory_is_another_one() -> None:
    weight = torch.ones(2)
    seen = Seen([weight])
    assert seen.unchanged([weight])
    assert seen.changed([weight]) == []
    assert not seen.unchanged([weight.detach()])
    assert seen.changed([weight.detach()]) == [0]


def test_a_tensor_that_is_gone_is_not_taken_for_a_new_one_in_its_place() -> None:
    tensors = [torch.ones(2)]
    seen = Seen(tensors)
    tensors.clear()
    assert not seen.alive()
    # a new tensor often gets the old one's id; made so here, since often is not always
    seen._ids = [id(new := torch.ones(2))]
    assert not seen.are([new])


@pytest.mark.parametrize("change", ["version", "storage"])
def test_a_tensor_written_to_or_moved_has_changed(change: str) -> None:
    kept, weight = torch.ones(2), nn.Parameter(torch.ones(2))
    seen = Seen([kept, weight])
    if change == "version":
        with torch.no_grad():
            weight.add_(1)
    else:
        weight.data = torch.ones(2)
    assert seen.are([kept, weight])
    assert not seen.unchanged([kept, weight])
    assert seen.changed([kept, weight]) == [1]


# what dynamo does around it


def test_a_graph_break_gives_two_graphs_and_each_is_rewritten() -> None:
    model = Net(lambda net, x: torch._dynamo.graph_break() or x)
    masks = half(model, "a", "c")
    ours = refused_until_applied(model, masks, r"not in this graph: torch.compile splits the model")
    assert [[r.name for r in report.rows] for report in ours.reports] == [["c.weight"], ["a.weight", "b.weight"]]
    assert ours.rows()[1] == {"a.weight": 16}


def test_more_broken_blocks_than_the_recompile_limit_share_a_graph_each_with_its_own_weights() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Net(lambda net, x: torch._dynamo.graph_break() or x) for _ in range(10))

        def forward(self, x: Tensor) -> Tensor:
            return sum(block(x) for block in self.blocks)

    model = Blocks()
    masks = half(model, *[f"blocks.{i}.a" for i in range(10)])
    Masks(masks).apply_(model)
    ours = Compiled(model.eval(), masks, verify="off", formats="dense")
    agree(ours(X), exact(model, masks, X))
    assert [rows for rows in ours.rows() if rows] == [{f"blocks.{i}.a.weight": 16} for i in range(10)]


def test_any_batch_size_and_no_more_than_three_graphs() -> None:
    model, masks = Net(), half(Net(), "a")
    ours = Compiled(model, masks)
    for batch in (2, 3, 5, 7, 1, 5):
        agree(ours(x := torch.randn(batch, 3, 8, 8)), exact(model, masks, x))
    assert ours.rows() == [{"a.weight": 16}] * 3  # batch 2, any batch, batch 1


def test_inductor_runs_any_batch_size() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    ours = Compiled(model, masks := half(model), target="inductor", dynamic=True)
    for batch in (3, 5):
        agree(ours(x := torch.randn(batch, 4)), exact(model, masks, x))
    assert ours.rows() == [{"0.weight": 4}]
    model[1].eps = 0.5  # a symbolic number under dynamic=True: it was baked in, so dynamo has to guard it
    agree(ours(x), exact(model, masks, x))
    assert len(ours.reports) == 2


def test_an_image_of_any_size_is_rewritten_once() -> None:
    model, masks = Net(), half(Net(), "a")
    ours = Compiled(model, masks, dynamic=True)
    for shape in ((2, 3, 8, 9), (4, 3, 12, 7)):
        agree(ours(x := torch.randn(shape)), exact(model, masks, x))
    assert ours.rows() == [{"a.weight": 16}]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # its new name is not in 5.0
def test_a_llama_decodes_with_a_growing_cache() -> None:
    DynamicCache = pytest.importorskip("transformers").DynamicCache
    ours, _ = decoded(lambda config: DynamicCache(config=config), 6)
    assert [len(rows) for rows in ours.rows()] == [2, 2, 2]  # the prompt, the first length, and any other


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda net, x: F.dropout(x, 0.0) + F.dropout(x), "draws random numbers"),
        (lambda net, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "control flow operator"),
    ],
)
@pytest.mark.filterwarnings("ignore:fxsparse compiles for inference:UserWarning")
def test_a_graph_that_is_no_inference_stays_dense(between: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = Compiled(Net(between), half(Net(), "a"))
    ours(X)
    assert ours.reports == []
    assert reason in caplog.text


def test_autocast_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    ours = Compiled(Net())
    with torch.autocast("cpu", torch.bfloat16):
        ours(X)
    assert "stays dense: autocast is on" in caplog.text


def test_an_output_that_is_a_view_of_an_input_still_is() -> None:
    class Views(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x), x[:, 1:].transpose(2, 3), x.view(2, -1), super().forward(x).t()

    model = Views()
    ours, theirs, x = Compiled(model)(X), model(X), X.clone()
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b)
        assert a.stride() == b.stride()
    compiled = Compiled(model)(x)
    x.zero_()
    assert float(compiled[1].abs().max()) == float(compiled[2].abs().max()) == 0.0


def test_outputs_have_eager_s_strides_though_the_sparse_kernel_writes_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1)).eval()
    mask = torch.zeros(64, 64, 1, 1, dtype=torch.bool)
    mask[:32, :32] = mask[32:, 32:] = True
    ours = Compiled(model, {"2.weight": mask}, formats="shuffled_block")
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        y = ours(x)
        assert y.stride() == model(x).stride()
        agree(y, exact(model, {"2.weight": mask}, x))
    assert ours.reports[0].rows[1].stored == "shuffled_block"


def test_state_is_written_and_buffers_that_change_become_inputs(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(16))
            self.register_buffer("shift", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return super().forward(x) + self.count + self.shift

    model = Counting()
    ours = Compiled(model)
    for i in range(4):
        y = ours(X)
        agree(y, Net.forward(model, X) + i + 1 + model.shift)
        assert int(model.count[0]) == i + 1
        model.shift += 1
    assert len(ours.reports) == 2  # once, and once more with `shift` as an input
    assert "built again: shift changed" in caplog.text


# weights that change


def assign(model: Net) -> None:
    model.load_state_dict({k: v.clone() * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()},
                          assign=True)  # fmt: skip


def step(model: Net) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


CHANGES = {
    "an optimizer's step": step,
    "load_state_dict": lambda model: model.load_state_dict(Net().state_dict()),
    "load_state_dict, assign": assign,
    "another parameter": lambda model: setattr(model.a, "weight", nn.Parameter(torch.randn(32, 16))),
    "other storage": lambda model: setattr(model.a.weight, "data", torch.randn(32, 16)),
    "a statistic": lambda model: model.bn.running_mean.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_seen_and_the_graph_is_built_again(change: Any) -> None:
    model, masks = Net(), half(Net(), "a")
    ours = Compiled(model, masks, verify="off")
    agree(before := ours(X), exact(model, masks, X))
    ours(X)
    assert len(ours.reports) == 1
    change(model)
    agree(after := ours(X), exact(model, masks, X))
    assert not torch.equal(before, after)
    assert len(ours.reports) == 2
    ours(X)
    assert len(ours.reports) == 2


def test_weights_may_change_more_often_than_dynamo_recompiles() -> None:
    model = Net()
    ours = Compiled(model, masks := half(model, "a"), verify="off", formats="dense")
    for _ in range(12):
        agree(ours(X), exact(model, masks, X))
        step(model)
    assert ours.rows() == [{"a.weight": 16}] * 12


def test_a_model_that_is_gone_is_forgotten() -> None:
    options = {"target": "eager", "measure": False, "verify": "off"}
    for _ in range(4):  # ids and memory are taken again
        model = Net()
        with torch.no_grad():
            agree(torch.compile(model, backend="fxsparse", options=options)(X), exact(model, {}, X))
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


# training, modes, threads


@pytest.mark.parametrize("standardized", [False, True], ids=["activations", "weights"])
def test_a_norm_by_the_statistics_of_its_input_is_no_training(standardized: bool) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.norm = nn.BatchNorm2d(8, eps=0.1, track_running_stats=False)  # dead channels have no variance

        def forward(self, x: Tensor) -> Tensor:
            if not standardized:
                return self.b(self.norm(self.a(x)).relu())  # type: ignore[no-any-return]
            w = F.batch_norm(self.b.weight.reshape(1, 4, -1), None, None, training=True).reshape_as(self.b.weight)
            return F.conv2d(self.a(x).relu(), w, self.b.bias)

    model, x = Normalized().eval(), torch.randn(2, 3, 8, 8)
    masks = half(model, "a")
    ours = Compiled(model, masks)
    agree(ours(x), exact(model, masks, x))
    assert len(ours.reports) == 1


def test_gradients_and_training_mode_stay_dense_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, masks = Net(), half(Net(), "a", "c")
    ours = Compiled(model, masks)
    with pytest.warns(UserWarning, match=r"compiles for inference.*call model.eval\(\).*torch.no_grad\(\)"):
        y = ours.call(X)
    agree(y, exact(model, masks, X))
    y.sum().backward()
    for name, mask in masks.items():  # masked weights take no part in training either
        gradient = model.get_parameter(name).grad
        assert not gradient[~mask].any()
        assert gradient[mask].any()
    assert "stays dense: gradients are asked for" in caplog.text
    model.train()
    with pytest.warns(UserWarning, match="compiles for inference"):
        ours(X)
    assert model.bn.running_mean.abs().sum() > 0
    assert "batch norm (bn) is in training mode" in caplog.text
    assert ours.reports == []
    model.eval()
    agree(ours(X), exact(model, masks, X))
    assert len(ours.reports) == 1


def test_inference_mode_gives_inference_tensors() -> None:
    model, masks = Net(), half(Net(), "a")
    ours = Compiled(model, masks)
    with torch.inference_mode():
        for x in (X, X + 1, X + 2):
            y = ours.call(x)
            assert y.is_inference()
            agree(y.clone(), exact(model, masks, x))
    assert ours.rows() == [{"a.weight": 16}] * 2  # dynamo tells ordinary tensors from inference tensors


def test_two_threads_compile_at_once() -> None:
    models = [Net(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()]
    masks = [half(models[0], "a"), half(models[1])]
    ours = [Compiled(model, mask, target="inductor") for model, mask in zip(models, masks, strict=True)]
    wrong: list[object] = []

    def run(i: int) -> None:
        try:
            for _ in range(3):
                agree(ours[i](X), exact(models[i], masks[i], X))
        except Exception as error:  # noqa: BLE001 - an assertion in a thread is seen by nobody
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {len(o.reports) for o in ours} <= {1, 2}  # dynamo lets two threads trace one frame


# registration and logs


def test_the_entry_point_needs_no_import_and_torch_logs_shows_our_logger(tmp_path: Path) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert points == {"torch_dynamo_backends": {"fxsparse": POINT}}
    info = tmp_path / "fxsparse-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxsparse\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\nfxsparse = {POINT}\n")
    code = (
        "import torch\n"
        "assert 'fxsparse' in torch._dynamo.list_backends()\n"
        "model = torch.compile(torch.nn.Linear(4, 4).eval(), backend='fxsparse', options={'target': 'eager'})\n"
        "with torch.no_grad(): print(model(torch.zeros(2, 4)).shape)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TORCH_LOGS": "fxsparse"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout == "torch.Size([2, 4])\n"
    assert "graph 0/0" in run.stderr
    assert "shrink_channels" in run.stderr


@pytest.fixture
def _logger_as_it_was() -> Iterator[None]:
    """The page turns torch's logging on, for the whole process."""
    logger = logging.getLogger("fxsparse")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers[:] = propagate, handlers


@pytest.mark.usefixtures("_logger_as_it_was")
def test_the_page_s_python_runs() -> None:
    page = (ROOT / "docs" / "torch_compile.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        exec(block, names)
    assert names["reports"][0].rows[0].name


# ------------------------------------------------------------ changes that leave no version behind, and sizes

QUICK = {"target": "eager", "measure": False}


def test_running_statistics_that_training_wrote_are_seen() -> None:
    """PyTorch's batch norm counts no version when it updates them: recalibration after pruning would be lost."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    compiled, x = torch.compile(model, backend="fxsparse", options=QUICK), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        compiled(x)
        for _ in range(2):  # they stay weights, folded into the convolution: state would be an input from now on
            before = model[1].running_mean._version
            model.train()(torch.randn(32, 3, 8, 8) * 3 + 1)
            model.eval()
            assert model[1].running_mean._version == before
            agree(compiled(x), model(x))


def test_storage_given_to_the_allocator_and_back_is_seen() -> None:
    """Two assignments of `.data` between calls: the second lands where the first weight was."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    compiled, x = torch.compile(model, backend="fxsparse", options=QUICK), torch.randn(4, 16)
    with torch.no_grad():
        compiled(x)
        for _ in range(6):
            for _ in range(2):
                model[0].weight.data = model[0].weight.data * 1.5
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


class Times(nn.Module):
    def __init__(self, how: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(16, 16), how

    def forward(self, x: Tensor, k: Any) -> Any:
        return self.how(self.linear(x), k)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_number_that_changes_leaves_the_graph_dense(dynamic: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    model = Times(lambda y, k: y * k).eval()
    compiled = torch.compile(model, backend="fxsparse", options=QUICK, dynamic=dynamic)
    x = torch.randn(2, 16)
    for k in (2, 3, 4):
        with torch.no_grad():
            agree(compiled(x, k), model(x, k))
    assert caplog.text.count("stays dense: it computes with the number") == 1


def test_sizes_and_values_that_depend_on_data_leave_the_graph_dense(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 16)
    flags = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(flags), torch.no_grad():
        for model in (Times(lambda y, k: y.nonzero()).eval(), Times(lambda y, k: y * k.sum().item()).eval()):
            agree(torch.compile(model, backend="fxsparse", options=QUICK)(x, x), model(x, x))
    assert caplog.text.count("depends on the data") == 2


class Counting(nn.Module):
    """All that its graph reads, but for the input, is state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_graph_whose_only_weight_turns_out_to_be_state() -> None:
    model, x = Counting().eval(), torch.randn(2, 16)
    compiled = torch.compile(model, backend="fxsparse", options=QUICK)
    for _ in range(4):
        with torch.no_grad():
            agree(compiled(x), model(x))
            model.scale.add_(1)
