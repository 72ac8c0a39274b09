"""Inputs by name: `example_inputs` as a dict, calls in any mixture, and what is left when the model is gone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse import CaptureError, InputError, Masks, PackageError
from fxsparse.ir.inputs import Call
from fxsparse.ir.version import VERSION
from fxsparse.package import container

X, Y, GATE = (torch.randn(2, n, generator=torch.Generator().manual_seed(n)).double() for n in (5, 5, 8))


class Gated(nn.Module):
    """Every kind of parameter but those that take any number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()
        self.eval()

    def forward(self, x: Tensor, y: Tensor | None = None, gate: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        hidden = torch.relu(self.a(x if y is None else x - y))
        out: Tensor = self.b(hidden if gate is None else hidden * gate) * scale
        return out


class Anything(Gated):
    """Names that only the call knows."""

    def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(inputs["x"], inputs["y"])


class Several(Gated):
    """Any number by position, and one by name."""

    def forward(self, *inputs: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(*inputs, gate=gate)


def masks() -> dict[str, Tensor]:
    alive = torch.arange(8) % 2 == 0
    return {"a.weight": alive[:, None].expand(8, 5).clone(), "a.bias": alive}


def build(model: nn.Module, example_inputs: Any, **options: Any) -> fxsparse.SparseModule:
    options = {"target": "eager", "measure": False, **options}
    return fxsparse.compile(model, masks(), example_inputs=example_inputs, **options)


def exact(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    Masks(masks()).apply_(model)
    with torch.no_grad():
        out: Tensor = model(*args, **kwargs)
    return out


def same(y: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "by name": lambda f: f(x=X, y=Y),
    "in another order": lambda f: f(y=Y, x=X),
    "by position": lambda f: f(X, Y),
    "in a mixture": lambda f: f(X, y=Y),
    "with a default": lambda f: f(X, Y, None),
    "with defaults by name": lambda f: f(gate=None, y=Y, scale=1.0, x=X),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("example", [{"y": Y, "x": X}, (X, Y), (X, Y, None), None], ids=str)
def test_however_it_was_compiled_it_is_called_in_any_way(example: Any, call: Callable[[Any], Tensor]) -> None:
    fast = build(Gated(), example)
    same(call(fast), exact(Gated(), X, Y))
    assert any(row.rows_removed == 4 for row in fast.report.rows)
    same(call(fast), exact(Gated(), X, Y))  # the first call may have compiled it


def test_what_comes_after_a_gap_keeps_its_name() -> None:
    fast = build(Gated(), {"x": X, "gate": GATE})
    assert [*fast.example.kwargs] == ["x", "gate"]
    for batch in (2, 1, 5):
        x, gate = X[:1].expand(batch, 5), GATE[:1].expand(batch, 8)
        same(fast(x, gate=gate), exact(Gated(), x, None, gate))
        same(fast(x, None, gate), exact(Gated(), x, None, gate))


def test_a_constant_by_name_is_part_of_the_function() -> None:
    fast = build(Gated(), {"x": X, "scale": -2.0})
    same(fast(X, scale=-2.0), exact(Gated(), X, scale=-2.0))
    for wrong in ({}, {"scale": 2.0}):
        with pytest.raises(InputError, match="of a SparseModule"):
            fast(X, **wrong)


def test_names_that_only_the_call_knows() -> None:
    """Of one batch size: torch.export's own check of sizes fails where they come in **inputs."""
    with pytest.raises(CaptureError, match="pass dynamic_batch=False"):
        build(Anything(), {"x": X, "y": Y})
    fast = build(Anything(), {"x": X, "y": Y}, dynamic_batch=False)
    same(fast(y=Y, x=X), exact(Gated(), X, Y))
    with pytest.raises(InputError, match="expected x, y; got x, gate"):
        fast(x=X, gate=GATE)


def test_any_number_by_position_and_one_by_name() -> None:
    fast = build(Several(), None)
    same(fast(X, Y, gate=GATE), exact(Gated(), X, Y, GATE))
    same(fast(X[:1], Y[:1], gate=GATE[:1]), exact(Gated(), X[:1], Y[:1], GATE[:1]))
    with pytest.raises(InputError, match="expected input 1, input 2, gate; got input 1, gate"):
        fast(X, gate=GATE)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda f: f(X), "got x."),
        (lambda f: f(X, gate=Y), "got x, gate."),
        (lambda f: f(X, Y, GATE), "got x, y, gate."),
        (lambda f: f(X, z=Y), "got an unexpected keyword argument 'z'."),
        (lambda f: f(X, x=X), "got multiple values for argument 'x'."),
        (lambda f: f(X, Y, Y, Y), "got too many positional arguments."),
        (lambda f: f(), "got missing a required argument: 'x'."),
    ],
)
def test_other_inputs_are_refused_by_their_names(call: Callable[[Any], Tensor], got: str) -> None:
    fast = build(Gated(), {"x": X, "y": Y})
    with pytest.raises(InputError, match="input of a SparseModule: expected x, y; got") as caught:
        call(fast)
    assert got in str(caught.value)
    assert "Call it as it was compiled, (x=..., y=...), or" in caught.value.do


def test_what_is_missing_or_too_much_is_said() -> None:
    fast = build(Anything(), {"x": X, "y": Y}, dynamic_batch=False)
    with pytest.raises(InputError, match=r"Missing: y. Not expected: gate. Call it as it was .*, \(x=..., y=...\)"):
        fast(x=X, gate=GATE)
    with pytest.raises(InputError, match=r"got x, y, gate.\n  Not expected: gate."):
        fast(x=X, y=Y, gate=GATE)


def test_an_input_of_another_shape_or_dtype_is_named() -> None:
    for fast in (build(Gated(), (X, Y)), build(Gated(), {"x": X, "y": Y})):
        with pytest.raises(InputError, match=r"^input 'y' of a SparseModule: expected .*2, 5.*; got .*2, 4"):
            fast(X, Y[:, 1:])
    fast = build(Several(), None)
    fast(X, Y, gate=GATE)
    with pytest.raises(InputError, match=r"^input 2 of a SparseModule: .*float32"):
        fast(X, Y.float(), gate=GATE)
    with pytest.raises(InputError, match=r"^input 'gate' of a SparseModule: .*NoneType"):
        fast(X, Y, gate=None)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"x": X, "z": Y}, "the model raises TypeError: .*unexpected keyword argument 'z'"),
        (
            {"x": X, 1: Y},
            "example_inputs: expected a tuple of positional inputs, or a dict of inputs by name; got a dict",
        ),
        ({"scale": 1.0}, "example_inputs: expected at least one tensor; got none"),
        ({"y": Y}, "missing 1 required positional argument: 'x'"),
        (5, "example_inputs: expected a tuple of positional inputs, or a dict of inputs by name; got int"),
    ],
)
def test_example_inputs_that_do_not_fit(example: Any, message: str) -> None:
    for run in (lambda: build(Gated(), example), lambda: fxsparse.plan(Gated(), masks(), example)):
        with pytest.raises(InputError, match=message):
            run()


def test_a_dry_run_takes_names_too() -> None:
    report = fxsparse.plan(Gated(), masks(), {"y": Y, "x": X})
    assert [row.rows_removed for row in report.rows] == [4, 0]


def test_names_and_defaults_are_saved(tmp_path: Path) -> None:
    build(Gated(), {"x": X, "y": Y}).save(path := tmp_path / "gated.fxsparse")
    loaded = fxsparse.load(path)
    for call in CALLS.values():
        same(call(loaded), exact(Gated(), X, Y))
    with pytest.raises(InputError, match="expected x, y; got x"):
        loaded(X)
    loaded.save(again := tmp_path / "again.fxsparse")
    assert container.read(again)[0] == container.read(path)[0]


NO_PLAIN_VALUE = object()


class OddDefault(Gated):
    def forward(self, x: Tensor, device: Any = NO_PLAIN_VALUE, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, y)


def test_a_default_that_is_no_plain_value_is_still_one(tmp_path: Path) -> None:
    build(OddDefault(), {"x": X, "y": Y}).save(path := tmp_path / "odd.fxsparse")
    same(fxsparse.load(path)(X, y=Y), exact(Gated(), X, Y))


@pytest.mark.parametrize(
    "signature",
    [
        5, "x", [["x"]], [["x", "IMPORT"]], [["x", "empty"]], [["1x", "KEYWORD_ONLY"]], [[[], "KEYWORD_ONLY"]],
        [["x", "KEYWORD_ONLY"], ["y", "POSITIONAL_ONLY"]], [["x", "KEYWORD_ONLY", [{"import": "os"}]]],
    ],
)  # fmt: skip
def test_a_signature_that_is_none_is_refused(tmp_path: Path, signature: Any) -> None:
    build(Gated(), {"x": X}).save(path := tmp_path / "gated.fxsparse")
    content, tensors, _ = container.read(path)
    container.write(path, {**content, "signature": signature}, tensors, VERSION)
    with pytest.raises(PackageError):
        fxsparse.load(path)


def test_onnx_and_aotinductor_keep_the_names(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    fast = fxsparse.compile(
        Gated().float(), masks(), "eager", example_inputs={"gate": GATE.float(), "x": X.float()}, measure=False
    )
    fxsparse.export_onnx(fast, path := tmp_path / "gated.onnx")
    assert {given.name for given in onnx.load(path).graph.input} == {"x", "gate"}
    fast.save_aoti(package := tmp_path / "gated.pt2")
    run = torch._inductor.aoti_load_package(str(package))
    torch.testing.assert_close(run(gate=GATE.float(), x=X.float()), fast(X.float(), gate=GATE.float()))


def test_a_bert_is_called_as_its_users_call_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    hidden = "bert.encoder.layer.0.intermediate.dense"
    alive = torch.arange(32) % 2 == 0
    halved = {f"{hidden}.weight": alive[:, None].expand(32, 16), f"{hidden}.bias": alive}
    batch = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    batch["attention_mask"][0, 4:] = 0
    fast = fxsparse.compile(model, halved, "eager", example_inputs=transformers.BatchEncoding(batch), measure=False)
    Masks(halved).apply_(model)
    with torch.no_grad():
        same(fast(**batch).logits, model(**batch).logits)
        same(fast(attention_mask=batch["attention_mask"], input_ids=batch["input_ids"]).logits, model(**batch).logits)
    assert any(row.rows_removed == 16 for row in fast.report.rows)


def test_positions_of_a_bert_have_no_batch(tmp_path: Path) -> None:
    """Nor have they in a package, or in an ONNX file, which is verified at other batch sizes."""
    pytest.importorskip("onnxscript")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config).eval()

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(50, (batch, 7)), "position_ids": torch.arange(7)[None].flip(1)}

    fast = fxsparse.compile(model, None, "eager", example_inputs=inputs(2), measure=False)
    fast.save(path := tmp_path / "bert.fxs")
    loaded = fxsparse.load(path)
    fxsparse.export_onnx(loaded, tmp_path / "bert.onnx")
    for f in (fast, loaded):
        for given in map(inputs, (2, 1, 5)):
            with torch.no_grad():
                torch.testing.assert_close(f(**given).logits, model(**given).logits)


def test_a_decoder_that_returns_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(50, (2, 7))
    compile = functools.partial(fxsparse.compile, model, None, "eager", measure=False)
    with pytest.raises(CaptureError, match=r"set model.config.use_cache = False"):
        compile(example_inputs={"input_ids": ids})
    assert compile(example_inputs={"input_ids": ids, "use_cache": False}).example.kwargs["use_cache"] is False
    model.config.use_cache = False
    with torch.no_grad():
        torch.testing.assert_close(compile(example_inputs={"input_ids": ids})(input_ids=ids).logits, model(ids).logits)


class ByPlace(Gated):
    def forward(self, x: Tensor, y: Tensor | None = None, gate: Tensor | None = None, /) -> Tensor:  # type: ignore[override]
        return super().forward(x, y, gate)


def test_what_has_no_name_keeps_its_place() -> None:
    fast = build(ByPlace(), (X, None, GATE))
    same(fast(X, None, GATE), exact(Gated(), X, None, GATE))
    with pytest.raises(InputError, match="got 'gate' parameter is positional only"):
        fast(X, gate=GATE)


@pytest.mark.parametrize(
    ("example", "call", "form"),
    [
        (Call((1, 2), {}), Call((), {"y": 4, "x": 3}), Call((3, 4), {})),
        (Call((), {"y": 2, "x": 1}), Call((3, 4), {}), Call((), {"y": 4, "x": 3})),
        (Call((1, None), {}), Call((3,), {}), Call((3, None), {})),
        (Call((1,), {}), Call((3, None), {"scale": 1.0}), Call((3,), {})),
        (Call((1,), {"gate": 2}), Call((3, None, 4), {}), Call((3,), {"gate": 4})),
        (Call((1,), {}), Call((3,), {"scale": 1}), None),  # an int, where the default is a float
        (Call((1,), {}), Call((3,), {"gate": 2}), None),
        (Call((1, 2), {}), Call((3,), {}), None),
    ],
)
def test_a_call_is_written_as_the_example_was(example: Call, call: Call, form: Call | None) -> None:
    signature = inspect.signature(Gated().forward)
    if form is not None:
        assert call.like(example, signature) == form
        return
    with pytest.raises(ValueError, match="another argument"):
        call.like(example, signature)


# where the form of a call matters, there is one


def test_hooks_see_the_call_as_it_was_written() -> None:
    model = Gated()
    model.register_forward_pre_hook(lambda module, args: tuple(2 * x for x in args))
    by_name, by_place = build(model, {"x": X, "y": Y}), build(model, (X, Y))
    wanted = exact(Gated(), X, Y), exact(Gated(), 2 * X, 2 * Y)
    same(by_name(x=X, y=Y), wanted[0])
    same(by_place(X, Y), wanted[1])
    for refused in (lambda: by_name(X, Y), lambda: by_place(x=X, y=Y)):
        with pytest.raises(InputError, match="of a SparseModule"):
            refused()


class Decorated(Gated):
    @functools.wraps(Gated.forward)
    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 2.0) -> Tensor:  # type: ignore[override]
        return super().forward(x, y, scale=scale)


def test_a_decorator_s_own_defaults_count() -> None:
    same(build(Decorated(), (X, Y, 1.0))(X, Y, 1.0), exact(Gated(), X, Y))
    fast = build(Decorated(), (X, Y))
    same(fast(X, Y), exact(Gated(), X, Y, scale=2.0))
    same(fast(X, Y, 2.0), exact(Gated(), X, Y, scale=2.0))
    with pytest.raises(InputError):
        fast(X, Y, 1.0)


SHIFT = torch.randn(2, 5, generator=torch.Generator().manual_seed(3)).double()


class Shifted(Gated):
    def forward(self, x: Tensor, y: Tensor = SHIFT) -> Tensor:  # type: ignore[override]
        return super().forward(x, y)


def test_a_tensor_that_is_a_default_is_an_input_like_others() -> None:
    fast = build(Shifted(), (X, SHIFT))
    for y in (SHIFT, Y):
        same(fast(X, y), exact(Gated(), X, y))
    with pytest.raises(InputError, match="expected x, y; got x"):
        fast(X)


def test_one_tensor_may_be_two_inputs() -> None:
    fast = build(Gated(), (X, X))
    same(fast(X, Y), exact(Gated(), X, Y))


class Signed(Gated):
    def forward(self, x: Tensor, sign: Any = 0.0) -> Tensor:  # type: ignore[override]
        return super().forward(torch.copysign(x, torch.tensor(sign, dtype=x.dtype)))


def test_constants_of_another_sign_or_type_are_others() -> None:
    fast = build(Signed(), (X,))
    same(fast(X, 0.0), exact(Signed(), X))
    for wrong in (-0.0, 0, False):
        with pytest.raises(InputError):
            fast(X, wrong)
    fast = build(Signed(), (X, 2))
    same(fast(X, 2), exact(Signed(), X, 2))
    for wrong in (2.0, -2, True):
        with pytest.raises(InputError):
            fast(X, wrong)


@pytest.mark.parametrize("sides", [0, 1, 3])
def test_a_package_whose_inputs_are_no_call_is_refused(tmp_path: Path, sides: int) -> None:
    build(Gated(), (X,)).save(path := tmp_path / "gated.fxsparse")
    content, tensors, _ = container.read(path)
    (key,) = content["graph"]["in"]
    content["graph"]["in"][key] = [*content["graph"]["in"][key], {"tuple": []}][:sides]
    container.write(path, content, tensors, VERSION)
    with pytest.raises(PackageError):
        fxsparse.load(path)
