"""compile() and plan() as a user meets them: the model stays as it was, the result is right for every call."""

import contextlib
import copy
import dataclasses
import gc
import io
import json
import pickle
import random
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations, prune

import fxsparse
from fxsparse import InputError, Masks, SparseModule, TargetError, VerificationError
from fxsparse.backend import TARGETS
from fxsparse.formats import FORMATS
from fxsparse.measure import QUALIFYING_ROUNDS, LayerTimes, Runs
from fxsparse.passes import fold_batch_norm
from fxsparse.verify import widen

ROWS = {"0.weight": [0, 3, 5], "0.bias": [0, 5], "3.weight": [1]}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Sequential):
    """A convolution net with statistics and biases away from 0."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip
        with torch.no_grad():
            self[1].running_mean.normal_()
            self[1].running_var.uniform_(0.5, 2)
            self[1].bias.uniform_(0.2, 1)
        self.eval()


class Wrapped(nn.Module):
    """Two layers and whatever a test does around them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(5, 8), nn.Linear(8, 3), function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def masks_of(model: nn.Module, rows: Mapping[str, list[int]] = ROWS) -> dict[str, Tensor]:
    masks = {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in rows}
    for name, index in rows.items():
        masks[name][index] = False
    return masks


def zeroed(model: nn.Module, masks: Any) -> nn.Module:
    """The reference: the user's own module with its weights set to zero."""
    copied = copy.deepcopy(model).eval()
    Masks(masks).apply_(copied)
    return copied


def build(model: nn.Module, masks: Any = None, inputs: Any = None, **options: Any) -> SparseModule:
    return fxsparse.compile(model, masks, example_inputs=inputs, **{"target": "eager", "measure": False, **options})


def agree(ours: Any, theirs: Any, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs, **tolerance)


def images(batch: int = 2, side: int = 8) -> Tensor:
    return torch.randn(batch, 2, side, side)


# ------------------------------------------------------------ the model stays


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a user can see of a model: attributes of every module by identity, tensors by identity and bits."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                seen |= {f"{path}.{name}[{key}]": _value(entry) for key, entry in value.items()}
                seen[f"{path}.{name} keys"] = list(value)
            else:
                seen[f"{path}.{name}"] = _value(value)
    return seen


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        bits = value.detach().contiguous().view(torch.uint8).tolist() if value.dim() else value.item()
        return type(value), id(value), value.requires_grad, value._version, value.stride(), bits
    return id(value)


def pruned(model: nn.Module) -> nn.Module:
    prune.ln_structured(model[0], "weight", amount=3, n=2, dim=0)
    prune.l1_unstructured(model[3], "weight", amount=0.5)
    return model


def weight_normed(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model[0])
    return model


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")
def weight_normed_by_hook(model: nn.Module) -> nn.Module:
    nn.utils.weight_norm(model[0])
    return model


def frozen(model: nn.Module) -> nn.Module:
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    return model


def half_in_training(model: nn.Module) -> nn.Module:
    model.train()
    model[1].eval()
    return model


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize("prepare", [pruned, weight_normed, weight_normed_by_hook, frozen, half_in_training])
@pytest.mark.parametrize("masks", [None, {"7.weight": torch.tensor([[1], [0], [1]]).expand(3, 6)}])
def test_the_model_is_left_bit_for_bit_and_attribute_for_attribute(
    prepare: Callable[[nn.Module], nn.Module], masks: Any
) -> None:
    model, x = prepare(Net()), images()
    before = snapshot(model)
    fast = build(model, masks, x, measure=prepare is pruned)
    fast(x)
    fast(images(5))
    fxsparse.plan(model, masks, (x,), target="eager")
    assert snapshot(model) == before
    assert not any(isinstance(v, FakeTensor) for m in model.modules() for v in vars(m).values())


def test_the_flat_weights_of_a_recurrent_layer_stay_its_own() -> None:
    model, x = nn.LSTM(5, 4, batch_first=True), torch.randn(2, 3, 5)
    build(model, None, x)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


def test_the_model_is_left_alone_when_compiling_fails() -> None:
    def forward(m: Wrapped, x: Tensor) -> Tensor:
        return m.b(m.a(x)) if x.sum() > 0 else x

    model = Wrapped(forward).train()
    before = snapshot(model)
    with pytest.raises(fxsparse.CaptureError):
        build(model, None, torch.randn(2, 5))
    assert snapshot(model) == before


def test_inputs_generators_and_modes_of_the_caller_are_left_alone() -> None:
    model, x = Net(), images()
    state, bits, threads = torch.get_rng_state(), x.clone(), torch.get_num_threads()
    build(model, None, x, measure=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, bits)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_later_changes_to_the_model_do_not_reach_the_result(target: str) -> None:
    model, x = Net(), images()
    fast = build(model, None, x, target=target)
    before = fast(x).clone(), fast(x[:1]).clone()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.rand(tensor.shape))  # load_state_dict and optimizers write in place
    assert torch.equal(fast(x), before[0])
    assert torch.equal(fast(x[:1]), before[1])


# ------------------------------------------------------------ masks


@pytest.mark.parametrize("how", ["zeros", "prune"])
def test_without_masks_zeros_and_pruning_are_found_and_the_model_is_its_own_reference(how: str) -> None:
    model, x = Net(), images()
    if how == "zeros":
        Masks(masks_of(model)).apply_(model)
    else:
        pruned(model)
    fast = build(model, None, x)
    agree(fast(x), model(x))
    assert fast.report.params_after < fast.report.params_before
    row = fast.report.rows[0]
    assert row.new_shape[0] < 8


def test_every_way_to_give_masks_gives_the_same_result(tmp_path: Path) -> None:
    model, x = Net(), images()
    masks = masks_of(model)
    path = tmp_path / "masks.safetensors"
    Masks(masks).save(path)
    forms = [masks, {n: m.float() for n, m in masks.items()}, Masks(masks), path, str(path)]
    results = [build(model, form, x)(x) for form in forms]
    assert all(torch.equal(y, results[0]) for y in results)
    agree(results[0], zeroed(model, masks)(x))
    assert not torch.allclose(results[0], model(x))


def test_masks_are_read_when_compile_is_called_not_at_the_first_run() -> None:
    model, x = Net(), images()
    masks = masks_of(model)
    fast = build(model, masks)
    reference = zeroed(model, masks)
    for mask in masks.values():
        mask.fill_(True)
    agree(fast(x), reference(x))


def test_masks_of_pruned_and_tied_weights_are_applied_under_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.hidden(self.embedding(tokens))))

    model, tokens = Tied().double(), torch.arange(8).view(2, 4)
    for name in ("head.weight", "embedding.weight"):
        masks = masks_of(model, {name: [2, 3, 4], "hidden.weight": [0, 1]})
        agree(build(model, masks, tokens)(tokens), zeroed(model, masks)(tokens), rtol=1e-10, atol=1e-10)
    model, x = pruned(Net()).double(), images().double()
    masks = masks_of(model, {"0.weight_orig": [7]})
    with pytest.warns(UserWarning, match="torch.nn.utils.prune's own masks in the model hold at zero"):
        fast = build(model, {"0.weight": masks["0.weight_orig"]}, x)
    Masks(masks).apply_(model)
    agree(fast(x), model(x), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------ when and for which inputs


def test_without_example_inputs_it_is_compiled_at_the_first_call() -> None:
    model, x = Net(), images()
    fast = build(model, masks_of(model))
    for what in ("report", "graph_module"):
        with pytest.raises(InputError, match=f"SparseModule.{what}: expected a compiled module") as caught:
            getattr(fast, what)
        assert "call the module once" in caught.value.do
    agree(fast(x), zeroed(model, masks_of(model))(x))
    assert fast.report.chosen == "sparse"
    assert fast(images(3)).shape == (3, 3)


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("example", [1, 4])
def test_any_batch_size_is_right(target: str, example: int) -> None:
    model = Net()
    masks = masks_of(model)
    fast, reference = build(model, masks, images(example), target=target), zeroed(model, masks)
    for batch in (example, 0, 1, 4, 7, example):
        x = images(batch)
        agree(fast(x), reference(x))
        assert fast(x).shape == (batch, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("example", ["contiguous", "channels_last", "expanded"])
def test_inputs_in_any_memory_layout_are_right(target: str, example: str) -> None:
    model = Net()
    masks = masks_of(model)
    fast, reference = build(model, masks, LAYOUTS[example](images()), target=target), zeroed(model, masks)
    for layout in LAYOUTS.values():
        for batch in (2, 3):
            x = layout(images(batch))
            agree(fast(x), reference(x))


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_a_chosen_channels_last_build_is_right_at_other_batch_sizes_too(
    monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr("fxsparse.contest.play_off", timed(sparse=3.0, channels_last=1.0))
    model = Net()
    fast, reference = (
        build(model, masks_of(model), images(), target=target, measure=True),
        zeroed(model, masks_of(model)),
    )
    assert fast.report.chosen == "dense"
    for batch in (2, 5, 0):
        x = images(batch)
        agree(fast(x), reference(x))


def test_another_shape_is_sent_to_torch_compile_where_that_would_do() -> None:
    fast = build(Net(), None, images())
    for x, more in ((images(2, 7), True), (images()[0], False), (images().double(), False)):
        with pytest.raises(InputError) as caught:
            fast(x)
        assert "Compile again with example_inputs of the new shape" in caught.value.do
        assert ("torch.compile(model, backend='fxsparse') builds for each" in caught.value.do) is more


@pytest.mark.parametrize(
    ("call", "expected", "got"),
    [
        (lambda f, x: f(x[:, :, :7]), "(2, 2, 8, 8) on cpu, any batch size", "(2, 2, 7, 8)"),
        (lambda f, x: f(x[0]), "(2, 2, 8, 8)", "(2, 8, 8)"),
        (lambda f, x: f(x.double()), "torch.float32", "torch.float64"),
        (lambda f, x: f(x.to("meta")), "on cpu", "on meta"),
        (lambda f, x: f(x, x), "input", "too many positional arguments"),
        (lambda f, x: f(), "input", "missing a required argument: 'input'"),
        (lambda f, x: f(x=x), "input", "missing a required argument: 'input'"),
        (lambda f, x: f([1]), "torch.float32", "list"),
        (lambda f, x: f((x,)), "torch.float32", "tuple"),
        (lambda f, x: f(None), "torch.float32", "NoneType"),
    ],
)  # fmt: skip
def test_a_call_that_does_not_fit_is_an_input_error(call: Callable[..., Any], expected: str, got: str) -> None:
    fast = build(Net(), None, images())
    with pytest.raises(InputError) as caught:
        call(fast, images())
    assert expected in caught.value.expected
    assert got in caught.value.got
    assert caught.value.do
    assert fast(images()).shape == (2, 3)


def test_with_a_fixed_batch_any_other_batch_is_refused() -> None:
    fast = build(Net(), None, images(2), dynamic_batch=False)
    assert fast(images(2)).shape == (2, 3)
    for batch in (0, 1, 3):
        with pytest.raises(InputError, match=r"expected torch.float32 \(2, 2, 8, 8\) on cpu; got"):
            fast(images(batch))


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_two_inputs_share_one_batch_size(target: str) -> None:
    model = Wrapped(lambda m, x, y: m.b(torch.relu(m.a(x) + y))).eval()
    masks = masks_of(model, {"a.weight": [0, 1, 2]})
    fast, reference = build(model, masks, (torch.randn(2, 5), torch.randn(2, 8)), target=target), zeroed(model, masks)
    for batch in (2, 1, 6):
        inputs = torch.randn(batch, 5), torch.randn(batch, 8)
        agree(fast(*inputs), reference(*inputs))
    for batches in ((6, 3), (2, 1), (1, 2)):
        with pytest.raises(InputError, match="expected one batch size in all inputs; got batch sizes"):
            fast(torch.randn(batches[0], 5), torch.randn(batches[1], 8))


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_inputs_and_outputs_keep_their_structure(target: str) -> None:
    def forward(m: Wrapped, x: Mapping[str, Tensor], scale: float, nothing: None) -> Any:
        y = torch.relu(m.a(x["image"])) * scale
        return {"logits": m.b(y), "none": nothing, "parts": (y, [x["shift"] + 1, 3])}

    model = Wrapped(forward).eval()
    masks = masks_of(model, {"a.weight": [0, 1, 2], "a.bias": [0]})
    inputs = ({"image": torch.randn(2, 5), "shift": torch.randn(2, 4)}, 0.5, None)
    fast, reference = build(model, masks, inputs, target=target), zeroed(model, masks)
    agree(fast(*inputs), reference(*inputs))
    turned = {"shift": torch.randn(3, 4), "image": torch.randn(3, 5)}
    agree(fast(turned, 0.5, None), reference(turned, 0.5, None))
    for wrong in (({"image": 0, "shifted": 0}, 0.5, None), (inputs[0], 0.25, None), (inputs[0], 0.5, 1)):
        with pytest.raises(InputError, match="of a SparseModule"):
            fast(*wrong)


def test_swapped_names_in_a_dict_are_not_swapped_inputs() -> None:
    model = Wrapped(lambda m, d: m.a(d["p"]) - 2 * m.a(d["q"])).eval()
    p, q = torch.randn(2, 5), torch.randn(2, 5)
    fast = build(model, None, ({"p": p, "q": q},))
    agree(fast({"q": q, "p": p}), model({"p": p, "q": q}))


def test_writing_to_an_output_harms_neither_the_input_nor_the_next_result() -> None:
    model = Wrapped(lambda m, x: (x[:, :3] + m.b(m.a(x)), x.clone(), m.a.weight * 2, x[:, 1:])).eval()
    Masks(masks_of(model, {"b.weight": [0, 1, 2], "b.bias": [0, 1, 2]})).apply_(model)
    x = torch.randn(2, 5)
    fast, bits, expected = build(model, None, x), x.clone(), model(x)
    for y in fast(x):
        y.fill_(7)
    assert torch.equal(x, bits)
    agree(fast(x), expected)


def test_integer_inputs() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    masks = masks_of(model, {"1.weight": [0, 1], "1.bias": [0], "0.weight": [3]})
    tokens = torch.randint(7, (2, 4))
    fast, reference = build(model, masks, tokens), zeroed(model, masks)
    for batch in (2, 5):
        tokens = torch.randint(7, (batch, 4))
        agree(fast(tokens), reference(tokens), rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match=r"expected torch\.int64"):
        fast(tokens.int())


@pytest.mark.parametrize(
    ("target", "dtype", "tolerance"),
    [
        ("eager", torch.float64, 1e-10), ("eager", torch.float32, 1e-5), ("eager", torch.bfloat16, 0.05),
        ("eager", torch.float16, 0.01), ("inductor", torch.bfloat16, 0.05),
    ],
)  # fmt: skip
def test_every_floating_dtype_compiles_and_verifies(target: str, dtype: torch.dtype, tolerance: float) -> None:
    model = Net().to(dtype)
    masks, x = masks_of(model), images().to(dtype)
    fast = build(model, masks, x, target=target)
    assert fast(x).dtype == dtype
    agree(fast(x).double(), zeroed(model, masks).double()(x.double()), rtol=tolerance, atol=tolerance)
    assert "largest |difference|" in fast.report.verification


def test_casts_inside_the_model_are_verified() -> None:
    def forward(m: Wrapped, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m.a(x)
        return m.b(torch.relu(y).float())

    model, x = Wrapped(forward).eval(), torch.randn(2, 5)
    masks = masks_of(model, {"a.weight": [0, 1]})
    agree(build(model, masks, x)(x), zeroed(model, masks)(x), rtol=0.02, atol=0.02)


class Labels(Net):
    """Whole numbers for each pixel."""

    def __init__(self, how: str = "argmax") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:5]:
            x = layer(x)
        if self.how == "bytes":
            return (x.sigmoid() * 255).to(torch.uint8)
        return x.argmax(1) if self.how == "argmax" else x > 0.3


@pytest.mark.parametrize("how", ["argmax", "threshold", "bytes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_rounding_turns_over_in_integers_is_no_error(how: str, dtype: torch.dtype) -> None:
    model, x = Labels(how).to(dtype), torch.randn(2, 2, 48, 48, dtype=dtype)
    assert build(model, masks_of(model), x)(x).dtype == model(x).dtype


def test_integers_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_batch_norm, "apply", _drop_norm)
    with pytest.raises(VerificationError, match=r"all but \d+ elements of it; got \d+ elements that differ"):
        build(Labels(), None, torch.randn(2, 2, 16, 16))


def _drop_norm(gm: Any, decision: Any) -> None:
    node = decision.data["node"]
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)


@torch.library.custom_op("fxsparse_test::narrow", mutates_args=())
def narrow(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise RuntimeError("no kernel for Double")
    return x * 2


narrow.register_fake(torch.empty_like)


def test_operators_that_have_no_float64_keep_what_they_read_and_cannot_be_verified() -> None:
    model = Wrapped(lambda m, x: m.b(narrow(m.a(x).relu())))
    x, masks = torch.randn(2, 5), {"a.weight": torch.arange(8)[:, None].expand(-1, 5) > 3}
    with pytest.raises(VerificationError, match="operators that run in float64 too; got RuntimeError: no kernel"):
        build(model, masks, x)
    fast = build(model, masks, x, verify="off")
    agree(fast(x), zeroed(model, masks)(x))
    assert [r.rows_removed for r in fast.report.rows] == [0, 0]


def test_complex_outputs_are_verified() -> None:
    model, x = Wrapped(lambda m, x: torch.fft.fft(m.b(torch.relu(m.a(x))))).eval(), torch.randn(2, 5)
    masks = masks_of(model, {"a.weight": [0, 1]})
    fast = build(model, masks, x)
    agree(fast(x), zeroed(model, masks)(x))
    assert fast(x).is_complex()


def test_compiling_and_calling_inside_inference_mode() -> None:
    model = Net()
    with torch.inference_mode():
        x = images()
        fast, lazy = build(model, masks_of(model), x), build(model, masks_of(model))
        expected = zeroed(model, masks_of(model))(x)
        agree(fast(x), expected)
        agree(lazy(x), expected)
    assert fast(images(3)).shape == (3, 3)


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_the_callers_default_dtype_and_device_are_no_part_of_the_result(target: str) -> None:
    model, x = Net(), images()
    masks = masks_of(model)
    torch.set_default_dtype(torch.float64)
    try:
        fast = build(model, masks, x, target=target)
        agree(fast(x), zeroed(model, masks)(x))
        with torch.device("meta"):  # whatever is made without a device has no data
            rows = build(model, masks, x, target=target, formats="dense").report.rows
        assert rows == tuple(dataclasses.replace(row, dense_for="") for row in fast.report.rows)
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------ an ordinary module


def test_only_evaluation_mode() -> None:
    fast = build(Net(), None, images())
    assert not fast.training
    assert fast.eval() is fast
    assert fast.train(False) is fast


def test_a_frozen_part_of_a_model_in_training_says_once_that_it_stays_in_evaluation_mode() -> None:
    fast = build(Net(), None, images())
    around = nn.Sequential(fast, nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="a SparseModule stays in evaluation mode, and no gradients pass") as told:
        around.train()
    assert len(told) == 1
    assert around.train() is around  # not again: warnings are errors here
    assert around[1].training
    assert not fast.training
    around(images()).sum().backward()
    assert around[1].weight.grad is not None


def test_it_is_printed_with_what_it_serves_its_target_and_what_it_gained() -> None:
    fast = build(Net(), None, images())
    shown = f"torch.float32 {tuple(images().shape)} on cpu, any batch size; target 'eager'; {fast.report.verdict}"
    assert repr(fast) == f"SparseModule({shown})"
    assert "any batch size" not in repr(build(Net(), None, images(), dynamic_batch=False))
    assert repr(build(Net(), None, None)) == "SparseModule(not compiled yet: the first call does it)"


def test_results_carry_no_gradients() -> None:
    x = images().requires_grad_()
    assert not build(Net(), None, images())(x).requires_grad


def test_the_state_dict_is_empty_and_conversions_to_what_it_is_do_nothing() -> None:
    fast, x = build(Net(), None, images()), images()
    assert fast.state_dict() == {}
    assert list(fast.parameters()) == []
    before = fast(x)
    around = nn.Sequential(fast).float().cpu().to(torch.float32).eval()
    assert torch.equal(around(x), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: nn.Sequential(m).to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.load_state_dict({}, strict=False),
        lambda m: m.prepare((images(side=9),)),
    ],
)
def test_what_would_change_nothing_is_refused(change: Callable[[SparseModule], Any]) -> None:
    fast, x = build(Net(), None, images()), images()
    before = fast(x)
    with pytest.raises(InputError, match=r"[Cc]ompile"):
        change(fast)
    assert torch.equal(fast(x), before)


def test_inputs_that_are_given_in_the_place_of_the_target_are_pointed_out() -> None:
    x = images()
    with pytest.raises(fxsparse.TargetError, match=r"got tuple.*\n.*example_inputs=\(x,\)") as error:
        fxsparse.compile(Net(), None, (x,))  # type: ignore[arg-type]
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("when", ["compiled", "lazy"])
def test_it_can_be_copied(target: str, when: str) -> None:
    model, x = Net(), images()
    fast = build(model, masks_of(model), x if when == "compiled" else None, target=target)
    other = copy.deepcopy(nn.Sequential(fast))[0]
    assert other is not fast
    agree(other(x), zeroed(model, masks_of(model))(x))
    agree(fast(x), other(x))
    assert str(other.report) == str(fast.report)


def test_a_target_is_pickled_and_copied_as_its_name() -> None:
    for target in (TARGETS["eager"], TARGETS["onnx"]):
        with contextlib.suppress(TargetError):  # a machine without it
            assert pickle.loads(pickle.dumps(target)) is target
            assert copy.deepcopy(target) is target


def test_it_can_be_pickled_until_it_is_compiled() -> None:
    model, x = Net(), images()
    fast = build(model, masks_of(model))
    other = pickle.loads(pickle.dumps(fast))
    agree(other(x), zeroed(model, masks_of(model))(x))
    fast(x)
    for save in (pickle.dumps, lambda f: torch.save(f, io.BytesIO())):
        with pytest.raises(InputError, match="expected a module that was not compiled yet") as caught:
            save(fast)
        assert "module.save(path)" in caught.value.do


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_its_graph_can_be_exported_and_it_can_be_part_of_a_compiled_model(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Net(), images()
    fast, expected = build(model, masks_of(model), x, target=target), zeroed(model, masks_of(model))(x)
    with pytest.raises(InputError, match=r"torch.export of a SparseModule: expected PyTorch's operators") as caught:
        torch.export.export(nn.Sequential(fast), (x,))
    assert "fast.graph_module" in caught.value.do
    agree(torch.export.export(fast.graph_module, (x,)).module()(x), expected)
    agree(torch.compile(nn.Sequential(fast), backend="eager")(x), expected)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # by another thread
    agree(fast(x), expected)


def in_threads(function: Callable[[int], None], count: int = 4) -> None:
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            function(i)
        except BaseException as error:  # noqa: BLE001 - given to the thread that started this one
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_threads_may_call_one_module_at_once(target: str) -> None:
    model = Net()
    fast, reference = build(model, masks_of(model), images(), target=target), zeroed(model, masks_of(model))

    def call(i: int) -> None:
        x = torch.randn(2 + i % 2, 2, 8, 8, generator=torch.Generator().manual_seed(i))
        expected = reference(x)
        for _ in range(30):
            agree(fast(x), expected)

    in_threads(call)


def test_threads_may_make_the_first_call_at_once() -> None:
    model, x = Net(), images()
    fast, reference = build(model, masks_of(model)), zeroed(model, masks_of(model))(x)
    in_threads(lambda i: agree(fast(x), reference))


# ------------------------------------------------------------ verification


@pytest.fixture
def wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_batch_norm.apply

    def wrong(gm: Any, decision: Any) -> None:
        weight = decision.data["node"].args[0].args[1]
        right(gm, decision)
        path, _, leaf = str(weight.target).rpartition(".")
        getattr(gm.get_submodule(path), leaf).mul_(1.001)

    monkeypatch.setattr(fold_batch_norm, "apply", wrong)


@pytest.mark.usefixtures("wrong_pass")
def test_a_wrong_pass_is_noticed_at_the_end() -> None:
    with pytest.raises(VerificationError, match="rewritten graph: expected the masked model's output within") as caught:
        build(Net(), None, images(), verify="end")
    assert "largest |difference|" in caught.value.got
    assert "output[0]" in caught.value.got
    assert "verify='each'" in caught.value.do


@pytest.mark.usefixtures("wrong_pass")
def test_a_wrong_pass_is_named_when_each_is_verified() -> None:
    with pytest.raises(VerificationError, match="fold_batch_norm"):
        build(Net(), None, images(), verify="each")


@pytest.mark.usefixtures("wrong_pass")
def test_nothing_is_noticed_without_verification_and_the_report_says_so() -> None:
    model, x = Net(), images()
    fast = build(model, None, x, verify="off")
    assert "not verified" in fast.report.verification
    assert not torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("verify", ["end", "each", "off"])
def test_right_passes_are_right_however_they_are_verified(verify: str) -> None:
    model, x = Net().double(), images().double()
    masks = masks_of(model)
    agree(build(model, masks, x, verify=verify)(x), zeroed(model, masks)(x), rtol=1e-10, atol=1e-10)


def test_the_float64_copy_of_a_model_is_let_go_once_it_has_been_run(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Tensor]] = []

    def recorded(gm: fx.GraphModule) -> fx.GraphModule:
        wide = widen(gm)
        copies.extend(map(weakref.ref, wide.buffers()))
        return wide

    monkeypatch.setattr("fxsparse.verify.widen", recorded)
    gc.disable()  # a graph and its module refer to each other
    try:
        build(Net(), None, images())
        assert copies
        assert not [ref for ref in copies if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("zeros", [True, False])
def test_verification_does_not_rest_on_the_values_of_the_example(wrong_pass: None, zeros: bool) -> None:
    with pytest.raises(VerificationError):
        build(Net(), None, torch.zeros(2, 2, 8, 8) if zeros else torch.ones(1, 2, 8, 8))


# ------------------------------------------------------------ measurement


def timed(sparse: float, channels_last: float = 1.5) -> Callable[..., Runs]:
    """`play_off` with made-up milliseconds: 2 for the dense builds."""

    def play_off(ours: Mapping[str, Callable[[], object]], rivals: Mapping[str, Callable[[], object]]) -> Runs:
        def ms(name: str) -> float:
            return sparse if name.startswith("sparse") else channels_last if "channels_last" in name else 2.0

        builds = {**ours, **rivals}
        for run in builds.values():
            run()
        return Runs({name: [ms(name)] * 10 for name in builds})

    return play_off


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_a_slower_result_is_not_returned(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr("fxsparse.contest.play_off", timed(sparse=3.0))
    model, x = Net(), images()
    masks = masks_of(model)
    fast = build(model, masks, x, target=target, measure=True)
    assert fast.report.chosen == "dense"
    assert (fast.report.dense_ms, fast.report.sparse_ms, fast.report.speedup) == (1.5, 3.0, 0.5)
    assert "The dense build is returned" in str(fast.report)
    assert "slower" in fast.report.verdict
    agree(fast(x), zeroed(model, masks)(x))
    convolutions = [n for n in fast.graph_module.graph.nodes if "conv" in str(n.target)]
    shapes = [tuple(fast.graph_module.get_buffer(n.args[1].target).shape) for n in convolutions]
    assert shapes == [(8, 2, 3, 3), (6, 8, 3, 3)]


def test_a_faster_result_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsparse.contest.play_off", timed(sparse=0.5))
    model, x = Net(), images()
    fast = build(model, masks_of(model), x, measure=True)
    assert fast.report.chosen == "sparse"
    assert fast.report.speedup == 3.0
    assert (fast.report.speedup_low, fast.report.speedup_high) == (3.0, 3.0)
    assert "The rewritten build is returned" in str(fast.report)
    agree(fast(x), zeroed(model, masks_of(model))(x))


def test_measuring_times_every_build_and_every_layer() -> None:
    model, x = Net(), images()
    fast = build(model, masks_of(model), x, measure=True, target="inductor")
    report = fast.report
    assert {t.build for t in report.timings} == {
        "sparse: inductor", "eager, contiguous", "eager, channels_last", "inductor, contiguous",
        "inductor, channels_last",
    }  # fmt: skip
    assert all(0 < t.p20_ms <= t.median_ms <= t.p80_ms and t.runs >= QUALIFYING_ROUNDS[0] for t in report.timings)
    medians = {t.build: t.median_ms for t in report.timings if t.together}
    assert {t.runs for t in report.timings if t.together} == {max(t.runs for t in report.timings)}
    assert report.sparse_ms == medians.pop("sparse: inductor")
    assert report.dense_ms == min(medians.values())
    assert report.speedup_low <= report.speedup == report.speedup_median <= report.speedup_high
    assert all(row.dense_us > 0 and row.sparse_us > 0 for row in report.rows)
    agree(fast(x), zeroed(model, masks_of(model))(x))


def test_without_measuring_no_times_are_claimed() -> None:
    report = build(Net(), None, images()).report
    assert (report.dense_ms, report.sparse_ms, report.speedup, report.timings) == (None, None, None, ())
    assert all(row.dense_us is None and row.sparse_us is None for row in report.rows)


def test_a_plan_tells_what_compile_would_do_and_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a dry run builds nothing")

    model, x = Net(), images()
    before, fast = snapshot(model), build(model, masks_of(model), x)
    monkeypatch.setattr("fxsparse.compiler.contest", never)
    monkeypatch.setattr("fxsparse.measure._time_ms", never)
    planned = fxsparse.plan(model, masks_of(model), (x,), target="eager")
    assert snapshot(model) == before
    assert planned.chosen == "not measured"
    assert "a dry run" in str(planned)
    assert planned.rows == fast.report.rows
    assert [str(d) for d in planned.decisions] == [str(d) for d in fast.report.decisions]
    assert planned.timings == ()


# ------------------------------------------------------------ the folder of layer times


def saved(folder: Path) -> dict[str, float]:
    (path,) = folder.glob("layer-times-*.json")
    found: dict[str, float] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_layer_times_are_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever the times are: made-up ones, since real ones seldom make a width worth rounding here."""
    generator = random.Random(seed)
    monkeypatch.setattr("fxsparse.compiler._LAYER_TIMES", {})
    monkeypatch.setattr("fxsparse.contest.play_off", timed(sparse=0.5))
    monkeypatch.setattr("fxsparse.measure._Case.measure_s", lambda case: generator.uniform(1, 2))
    model, x, folder = Net(), images(), tmp_path / "new"
    build(model, masks_of(model), x, measure=True, cache_dir=folder)
    times = saved(folder)
    assert times
    assert all(isinstance(s, float) and 1 <= s <= 2 for s in times.values())
    monkeypatch.setattr("fxsparse.measure._Case.measure_s", lambda case: pytest.fail(f"{case.key} was measured again"))
    build(model, masks_of(model), x, measure=True)  # what this process has measured
    monkeypatch.setattr("fxsparse.compiler._LAYER_TIMES", {})
    build(model, masks_of(model), x, measure=True, cache_dir=folder)
    assert saved(folder) == times


def test_a_layer_time_is_measured_and_remembered() -> None:
    times = LayerTimes(None, batch=2)
    gm = build(Net(), None, images()).graph_module
    layer = next(n for n in gm.graph.nodes if "conv2d" in str(n.target))
    first = times(layer, 8, 2)
    assert first > 0
    assert times(layer, 8, 2) == first
    assert len(times.seconds) == 1
    times(layer, 7, 2)
    assert len(times.seconds) == 2


def test_what_reads_an_input_is_timed_with_other_things_in_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    cold: dict[str, bool] = {}
    monkeypatch.setattr(
        "fxsparse.measure._Case.measure_s", lambda case: cold.setdefault(str(case.key), case.from_memory)
    )
    gm = build(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), None, torch.ones(1, 3, 8, 8)
    ).graph_module
    layers = [n for n in gm.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    times = LayerTimes(None, batch=1)
    for node, columns in zip(layers, (3, 8), strict=True):
        times(node, 8, columns)
        times.of_format(node, FORMATS["shuffled_block"].pack(torch.ones(8, columns, 3, 3)))
    assert list(cold.values()) == [True, True, False, False]
    assert ["from memory" in key for key in cold] == [True, True, False, False]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"k": "fast"}', '{"k": null}', "\x00\xff"])
def test_a_corrupt_file_of_layer_times_is_made_anew(tmp_path: Path, content: str) -> None:
    times = LayerTimes(tmp_path, 1)
    times.path.write_text(content)
    times = LayerTimes(tmp_path, 1)
    assert times.seconds == {}
    times.seconds["k"] = 0.5
    times.save()
    assert saved(tmp_path) == {"k": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == [times.path.name]


def test_two_that_save_layer_times_keep_both(tmp_path: Path) -> None:
    first, second = LayerTimes(tmp_path, 1), LayerTimes(tmp_path, 1)
    first.seconds["a"], second.seconds["b"] = 1.0, 2.0
    first.save()
    second.save()
    assert saved(tmp_path) == {"a": 1.0, "b": 2.0}


def test_layer_times_that_cannot_be_saved_are_only_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = LayerTimes(tmp_path, 1)
    times.path.mkdir()
    times.save()
    assert f"layer times are not kept in {times.path}: there is a folder" in caplog.text


def test_layer_times_saved_at_once_are_never_half_a_file(tmp_path: Path) -> None:
    def save(i: int) -> None:
        for k in range(20):
            times = LayerTimes(tmp_path, 1)
            times.seconds |= {f"{i}.{k}.{j}": 1.0 for j in range(50)}
            times.save()
            assert len(saved(tmp_path)) >= 50

    in_threads(save)
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


def test_a_weight_that_two_calls_share_is_right_in_both() -> None:
    model = (
        Wrapped(lambda m, x: F.linear(torch.relu(m.a(x)), m.b.weight) - F.linear(m.a(x), m.b.weight)).double().eval()
    )
    masks, x = masks_of(model, {"a.weight": [0, 1], "a.bias": [0], "b.weight": [2]}), torch.randn(3, 5).double()
    agree(build(model, masks, x)(x), zeroed(model, masks)(x), rtol=1e-10, atol=1e-10)


def test_builds_that_lost_and_modules_that_are_gone_leave_no_weights_behind() -> None:
    """Inductor keeps every module it generates, weights and all."""
    from torch._inductor.codecache import PyCodeCache

    def held() -> set[str]:
        modules = [*PyCodeCache.modules, *(m for name, m in sys.modules.items() if "compile_tasks" in name)]
        return {m.__name__ for m in modules if any(isinstance(v, Tensor) for v in vars(m).values())}

    before = held()
    model, x = Net(), images()
    fast = build(model, masks_of(model), x, target="inductor", measure=True)
    with torch.no_grad():
        assert fast(images(3)).shape[0] == 3  # any batch size: a build of its own
    assert held() == before


def test_a_masked_weight_that_is_no_layer_s_is_named() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(50, 16), nn.Linear(16, 4)

        def forward(self, words: Tensor) -> Any:
            return self.linear(self.table(words))

    mask = torch.ones(50, 16, dtype=torch.bool)
    mask[::2] = False
    report = fxsparse.plan(Words().eval(), {"table.weight": mask}, (torch.randint(0, 50, (2, 5)),))
    (named,) = [d for d in report.decisions if d.where == "table.weight"]
    assert not named.accepted
    assert named.why == "embedding is no layer that gets faster by it"


def test_a_pruned_weight_that_is_no_layer_s_is_named_and_masks_of_prune_are_in_the_report() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)).eval()
    for i in (0, 2):
        prune.l1_unstructured(model[i], "weight", 0.5)
    report = fxsparse.plan(model, None, (images(),))
    assert any(d.where == "2.weight" and not d.accepted for d in report.decisions)
    assert report.masks is not None
    assert {"0.weight", "2.weight"} <= set(report.masks)


def test_untimed_a_format_that_stores_more_than_the_weight_is_not_chosen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)).eval()
    for density, stored in ((0.2, "unstructured"), (0.28, "dense")):
        mask = torch.rand(32, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < density
        report = fxsparse.plan(model, {"0.weight": mask}, (torch.randn(1, 3, 8, 8),))
        of_mask = [d for d in report.decisions if d.step == "choose_formats" and d.where == "0.weight"]
        assert all(d.data["packed"].nse < mask.numel() for d in of_mask if d.accepted)
        row = report.rows[0]
        assert row.stored == stored
        assert bool(row.dense_for) == (stored == "dense")
        assert report.macs_after <= report.macs_before
