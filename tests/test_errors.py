"""Every bad input has one answer: an error of ours that says where, what was expected, what came, and what to do."""

import contextlib
import logging
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

import fxsparse
from fxsparse import CaptureError, FxSparseError, InputError, MaskError, TargetError, VerificationError
from fxsparse.backend import TARGETS
from fxsparse.backend.inductor import failing_as
from fxsparse.errors import near
from fxsparse.ir.capture import _explain, _users_line, capture
from fxsparse.ir.graph import refresh
from fxsparse.ir.inputs import Call
from fxsparse.ir.quiet import tracing_quietly


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


EXAMPLE = (torch.ones(2, 5),)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def build(model: Any = None, masks: Any = None, inputs: Any = EXAMPLE, **options: Any) -> Any:
    options = {"target": "eager", "measure": False, **options}
    return fxsparse.compile(model or net(), masks, example_inputs=inputs, **options)


@contextlib.contextmanager
def refused(kind: type[FxSparseError], *, where: str, expected: str, got: str, do: str) -> Iterator[None]:
    """Exactly this class, each part with its key words, and the text made of the four parts."""
    with pytest.raises(FxSparseError) as caught:
        yield
    error = caught.value
    assert type(error) is kind
    assert where in error.where
    assert expected in error.expected
    assert got in error.got
    assert do in error.do
    assert str(error) == f"{error.where}: expected {error.expected}; got {error.got}.\n  {error.do}"
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


class Function(nn.Module):
    """Two layers and whatever a test does around them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(5, 8), nn.Linear(8, 3), function
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def test_a_mask_for_an_unknown_parameter() -> None:
    with refused(MaskError, where="'0.wieght'", expected="one of the model's 4 parameters", got="does not have",
                 do="'0.weight'"):  # fmt: skip
        build(masks={"0.wieght": torch.ones(8, 5)})


def test_a_mask_of_the_wrong_shape() -> None:
    with refused(MaskError, where="'0.weight'", expected="(8, 5)", got="(5, 8)", do="mask[:, None].expand_as(weight)."):
        build(masks={"0.weight": torch.ones(5, 8)})


@pytest.mark.parametrize(
    ("mask", "expected", "got"),
    [
        (torch.full((8, 5), 0.5), "only 0 and 1", "40 other values, the first 0.5"),
        (torch.ones(8, 5, dtype=torch.complex64), "bool, integer or float", "complex64"),
        ([[1]], "a tensor", "list"),
    ],
)
def test_a_mask_of_the_wrong_dtype_or_values(mask: object, expected: str, got: str) -> None:
    with refused(MaskError, where="'0.weight'", expected=expected, got=got, do="one bool per weight"):
        build(masks={"0.weight": mask})


def test_a_mask_error_comes_before_any_compiling_even_when_that_is_put_off() -> None:
    with refused(MaskError, where="'x'", expected="4 parameters", got="does not have", do="look like '0.weight'"):
        build(masks={"x": torch.ones(1)}, inputs=None)


@pytest.mark.parametrize("masks", [5, [torch.ones(8, 5)], net().state_dict().values()])
def test_masks_that_are_no_mapping(masks: object) -> None:
    with refused(InputError, where="masks", expected="a dict by parameter name", got=type(masks).__name__,
                 do="leave masks out"):  # fmt: skip
        build(masks=masks)


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:0"])
def test_a_gpu_is_no_target(name: str) -> None:
    with refused(
        TargetError, where=name, expected="'inductor'", got="an unknown name", do="chosen by model.cuda(), with"
    ):
        build(target=name)


def test_a_folder_in_the_place_of_a_file_names_one_inside(tmp_path: Path) -> None:
    fast = build()
    with refused(InputError, where=str(tmp_path), expected="a file", got="a folder", do="/model.onnx, say."):
        fxsparse.export_onnx(fast, tmp_path)
    with refused(InputError, where=str(tmp_path), expected="a file", got="a folder", do=f"{tmp_path}/report.html"):
        fast.report.to_html(tmp_path)


def test_a_masks_file_that_is_missing(tmp_path: Path) -> None:
    with refused(MaskError, where="no.safetensors", expected="readable", got="no such file", do="looked for in"):
        build(masks=tmp_path / "no.safetensors")


def test_control_flow_that_depends_on_data() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        return m.b(m.a(x)) if x.sum() > 0 else x

    line = f"at {__file__}:{forward.__code__.co_firstlineno + 1} in forward"
    with refused(CaptureError, where="Function", expected="torch.export", got="data-dependent", do="Rewrite that line"):
        build(Function(forward))
    with pytest.raises(CaptureError, match=re.escape(line)):
        build(Function(forward))


def test_without_a_line_of_the_users_none_is_named() -> None:
    error = _explain(Function(lambda m, x: x), Call((torch.ones(2),), {}), RuntimeError("no frames"), False)
    assert "got RuntimeError: no frames.\n  Rewrite the part that it cannot follow without" in str(error)


def test_generated_code_is_not_the_user_s() -> None:
    made: dict[str, Any] = {}
    exec(compile("def forward():\n    raise ArithmeticError", "<eval_with_key>.7", "exec"), made)
    with pytest.raises(ArithmeticError) as caught:
        made["forward"]()
    assert _users_line(caught.value).startswith(f"{__file__}:")


def test_torch_s_own_print_is_there_again_whoever_was_first() -> None:
    import torch.export._trace

    with contextlib.ExitStack() as outer:
        outer.enter_context(tracing_quietly())
        with tracing_quietly():
            assert "print" in vars(torch.export._trace)
        assert "print" in vars(torch.export._trace)
    assert "print" not in vars(torch.export._trace)


@pytest.fixture
def heard() -> Iterator[Callable[[str], list[str]]]:
    """What the logger of a name lets through from then on."""
    with contextlib.ExitStack() as undo:

        def hear(name: str) -> list[str]:
            messages: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
            logging.getLogger(name).addHandler(handler)
            undo.callback(logging.getLogger(name).removeHandler, handler)
            return messages

        yield hear


def test_torch_says_nothing_before_our_error(
    capsys: pytest.CaptureFixture[str], heard: Callable[[str], list[str]]
) -> None:
    shapes, symbols = (
        heard(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    )
    with pytest.raises(InputError):
        build(inputs=torch.ones(2, 7))
    with pytest.raises(CaptureError):
        build(Function(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else x))
    assert (shapes, symbols, capsys.readouterr().err) == ([], [], "")
    logging.getLogger("torch._subclasses.fake_tensor").warning("something else")
    with tracing_quietly():
        logging.getLogger("torch._subclasses.fake_tensor").warning("something else")
    assert shapes == ["something else"] * 2


def test_no_word_of_a_gpu_while_compiling_and_of_nothing_else(heard: Callable[[str], list[str]]) -> None:
    logger, messages = logging.getLogger("torch.utils.cpp_extension"), heard("torch.utils.cpp_extension")
    with failing_as("target"):
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
        logger.warning("g++ is too old")
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/opt")
    assert messages == ["g++ is too old", "No CUDA runtime is found, using CUDA_HOME='/opt'"]


def test_a_pruned_weight_that_its_module_does_not_apply_itself_warns_of_nothing() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("the user's own", UserWarning, stacklevel=2)
            return cast(Tensor, self.m(x, x, x, need_weights=False)[0])

    model = Attention().eval()
    l1_unstructured(model.m.out_proj, "weight", 0.5)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        capture(model, (torch.randn(2, 3, 8),), fxsparse.Masks(), dynamic_batch=False)
    assert {str(w.message) for w in found} == {"the user's own"}


def test_a_branch_inside_the_graph() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: m.a(y + 1), lambda y: m.a(-y), (x,))

    with refused(CaptureError, where="Function", expected="one flat graph", got="cond", do="torch.where"):
        build(Function(forward))


def test_a_model_that_changes_its_buffers_and_is_left_as_it_was() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        m.steps += 1
        return m.a(x) * m.steps

    model = Function(forward)
    with refused(CaptureError, where="Function", expected="without side effects", got="changes 'steps'", do="outside"):
        build(model)
    assert model.steps == 0


def test_a_model_that_writes_to_its_input_and_the_input_is_left_as_it_was() -> None:
    x = torch.ones(2, 5)
    with refused(CaptureError, where="Function", expected="without side effects", got="its input", do="x.clone()"):
        build(Function(lambda m, x: m.a(x.add_(1))), inputs=x)
    assert torch.equal(x, torch.ones(2, 5))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.dropout(m.a(x)),
        lambda m, x: m.b(m.a(x) + torch.randn(8)),
        lambda m, x: m.a(x) + torch.rand_like(m.a(x)),
        lambda m, x: F.scaled_dot_product_attention(m.a(x)[None], m.a(x)[None], m.a(x)[None], dropout_p=0.5),
    ],
)
def test_a_model_that_draws_random_numbers(function: Callable[..., Tensor]) -> None:
    """Its own noise would make every verification pass."""
    with refused(
        CaptureError, where="Function", expected="on its input alone", got="random operator", do="self.training"
    ):
        build(Function(function))


def test_dropout_that_is_off_is_no_randomness() -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop, self.rnn = nn.Linear(5, 8), nn.Dropout(0.5), nn.GRU(8, 4, 2, dropout=0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.rrelu(F.dropout(self.drop(self.a(x)), training=self.training), training=self.training)[None]
            return self.rnn(F.scaled_dot_product_attention(y, y, y, dropout_p=0.0))[0]

    model, x = Quiet(), torch.randn(3, 5)  # in training mode: compile evaluates
    with pytest.warns(UserWarning, match="in training mode"):
        fast = build(model, inputs=x)
    torch.testing.assert_close(fast(x), model.eval()(x))


@pytest.mark.parametrize(
    ("inputs", "cause"),
    [
        ((torch.ones(2, 6),), "RuntimeError"),
        ((torch.ones(1, 6),), "((1, 6) torch.float32)"),  # as it was given, though a batch of two is exported
        ((torch.ones(2, 5), torch.ones(2, 5)), "TypeError"),
        ((torch.ones(2, 5, dtype=torch.int64),), "same dtype"),
    ],
)
def test_inputs_that_do_not_fit_the_model(inputs: tuple[Tensor, ...], cause: str) -> None:
    with refused(InputError, where="example_inputs for Sequential", expected="the model itself accepts", got=cause,
                 do="model(*example_inputs)"):  # fmt: skip
        build(inputs=inputs)


@pytest.mark.parametrize("inputs", [(), (None,), (1, 2), ((2, 5),), {}, {"input": None}])
def test_example_inputs_without_a_tensor(inputs: object) -> None:
    with refused(InputError, where="example_inputs", expected="at least one tensor", got="none",
                 do="(torch.randn(1, 3, 224, 224),)"):  # fmt: skip
        build(inputs=inputs)


@pytest.mark.parametrize("inputs", ["image.png", 5, {1: torch.ones(2, 5)}, {torch.ones(2, 5)}])
def test_example_inputs_that_are_neither_a_tuple_nor_a_dict_by_name(inputs: object) -> None:
    with refused(InputError, where="example_inputs", expected="a tuple of positional inputs, or a dict of inputs by",
                 got="a dict with other keys" if isinstance(inputs, dict) else type(inputs).__name__,
                 do="(torch.randn(1, 3, 224, 224),)"):  # fmt: skip
        build(inputs=inputs)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_as_the_example(shape: tuple[int, ...]) -> None:
    with refused(InputError, where="example_inputs", expected="at least one sample", got=str(shape), do="one sample"):
        build(inputs=torch.ones(shape))


@pytest.mark.parametrize("cxx", [None, "no-such-compiler -O2"])
def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cxx: str | None) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if cxx:
        monkeypatch.setenv("CXX", cxx)
    with refused(TargetError, where="target 'inductor'", expected=cxx or "g++", got="none", do="target='eager'"):
        build(target="inductor")
    with refused(TargetError, where="target 'inductor'", expected=cxx or "g++", got="none", do="apt-get install g++"):
        fxsparse.plan(net(), None, (torch.ones(2, 5),))
    assert build()(torch.ones(2, 5)).shape == (2, 3)


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: none works\nSet TORCHDYNAMO_VERBOSE=1")

    for name in ("compile", "standalone_compile", "aoti_compile_and_package"):
        monkeypatch.setattr(f"torch._inductor.{name}", fails)
    failed = {"expected": "a C++ compiler", "got": "RuntimeError: InvalidCxxCompiler: none works", "do": "nothing"}
    with refused(TargetError, where="target 'inductor'", **failed):
        build(target="inductor")
    with refused(TargetError, where="target 'inductor'", **failed):
        TARGETS["inductor"].lower_dynamic(build().graph_module)
    with refused(TargetError, where="AOTInductor package", **failed):
        build().save_aoti(tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["indctor", "tvm", ["eager"], None, torch.compile])
def test_an_unknown_target_lists_the_known_ones(target: Any) -> None:
    name = isinstance(target, str)
    with refused(TargetError, where=repr(target), expected="'eager', 'inductor'" if name else "the name of a target",
                 got="unknown" if name else type(target).__name__, do="'inductor'"):  # fmt: skip
        build(target=target)


@pytest.mark.parametrize(("option", "known"), [("formats", "'auto'"), ("verify", "'end', 'each', 'off'")])
@pytest.mark.parametrize("value", ["x", None, True, ["end"]])
def test_an_unknown_value_of_an_option_lists_the_known_ones(option: str, known: str, value: object) -> None:
    with refused(InputError, where=f"{option}={value!r}", expected=known, got="", do=""):
        build(**{option: value})


@pytest.mark.parametrize("option", [{"dynamic_batch": "no"}, {"measure": "yes"}, {"measure": 1}])
def test_a_switch_that_is_neither_true_nor_false(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with refused(InputError, where=f"{name}={value!r}", expected="True or False", got=type(value).__name__, do=name):
        build(**option)


def test_a_misspelt_option_gets_a_suggestion() -> None:
    with refused(InputError, where="verify='eech'", expected="'each'", got="'eech'", do="Did you mean 'each'"):
        build(verify="eech")


@pytest.mark.parametrize("model", [nn.Linear, net().state_dict(), torch.relu, "resnet18"])
def test_a_model_that_is_no_module(model: object) -> None:
    with refused(
        InputError, where="model", expected="torch.nn.Module", got=type(model).__name__, do="the module itself"
    ):
        build(model)
    with refused(
        InputError, where="model", expected="torch.nn.Module", got=type(model).__name__, do="the module itself"
    ):
        fxsparse.plan(model, None, (torch.ones(2, 5),), target="eager")


def test_a_model_without_values() -> None:
    with refused(InputError, where="'0.weight'", expected="values", got="meta", do="load_state_dict"):
        build(net().to("meta"))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_that_never_ran_stays_as_it_is() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with refused(InputError, where="'0.weight'", expected="a value", got="lazy", do="Run the model once"):
        build(model)
    assert model[0].has_uninitialized_params()


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = net()
    with refused(InputError, where="'0.weight'", expected="ordinary", got="inference_mode", do="outside"):
        build(model)


def test_a_plan_without_shapes() -> None:
    with refused(InputError, where="example_inputs of plan", expected="tuple", got="None", do="plan(model, masks,"):
        fxsparse.plan(net(), None, target="eager")


def test_a_cache_folder_that_cannot_be_one(tmp_path: Path) -> None:
    """Found out before anything is measured; /proc exists and takes no file, from root neither."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc", "", 5, b"bytes", "a\0b"):
        with refused(InputError, where="cache_dir", expected="a folder", got="Error", do="leave cache_dir out"):
            build(cache_dir=path)


def test_example_inputs_that_are_not_dense() -> None:
    for x, got in ((EXAMPLE[0].to_sparse(), "sparse_coo"), (nested(), "a nested tensor")):
        with refused(InputError, where="example_inputs", expected="dense tensors", got=got, do="to_dense()"):
            build(inputs=x)
        with refused(InputError, where="SparseModule", expected="(2, 5)", got=got, do="Compile again"):
            build()(x)


def nested() -> Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def test_a_model_in_a_parallel_wrapper() -> None:
    with refused(InputError, where="model", expected="itself", got="DataParallel", do="model.module"):
        build(nn.DataParallel(net()))


def test_a_model_that_is_compiled_already() -> None:
    with refused(InputError, where="model", expected="not compiled", got="a SparseModule", do="original model"):
        build(build())
    with refused(InputError, where="model", expected="not compiled", got="as its part '0'", do="original model"):
        build(nn.Sequential(build(), nn.ReLU()))


def test_a_model_without_an_evaluation_mode() -> None:
    exported = torch.export.export(net(), EXAMPLE).module()
    with refused(CaptureError, where="capture", expected="evaluation mode", got="NotImplementedError", do="exported"):
        build(exported)


def test_an_operator_whose_symbolic_shape_only_torch_s_python_rules_know() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Bilinear(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x), self.a(x))

    model, more = Twice().eval(), torch.randn(7, 5)
    fast = build(model)
    torch.testing.assert_close(fast(*EXAMPLE), model(*EXAMPLE))
    torch.testing.assert_close(fast(more), model(more))
    torch.testing.assert_close(build(model, dynamic_batch=False)(*EXAMPLE), model(*EXAMPLE))


def test_an_operator_whose_shape_torch_cannot_work_out() -> None:
    model = nn.Linear(5, 8).eval()
    gm = capture(model, EXAMPLE, fxsparse.Masks(), dynamic_batch=True)
    gm.weight = torch.zeros(8, 4)
    with refused(CaptureError, where="linear", expected="without data", got="RuntimeError", do="dynamic_batch"):
        refresh(gm)


def test_a_model_for_one_batch_size_only() -> None:
    model, x = Function(lambda m, x: m.b(torch.relu(m.a(x)).view(4, 8))), torch.randn(4, 5)
    with refused(CaptureError, where="Function", expected="torch.export", got="", do="dynamic_batch=False"):
        build(model, inputs=x)
    fast = build(model, inputs=x, dynamic_batch=False)
    torch.testing.assert_close(fast(x), model(x))
    with refused(InputError, where="SparseModule", expected="(4, 5)", got="(3, 5)", do="Compile again"):
        fast(x[:3])


def test_a_model_for_one_batch_size_only_and_an_example_of_one_sample() -> None:
    model, x = Function(lambda m, x: m.b(m.a(x) + m.a(x).expand(1, 8))), torch.randn(1, 5)
    with refused(CaptureError, where="Function", expected="torch.export", got="expand", do="dynamic_batch=False"):
        build(model, inputs=x)


def test_an_input_without_a_batch() -> None:
    """Told by its size: the batch is that of the first tensor."""
    model = Function(lambda m, x, scale: m.b(m.a(x) + scale))
    fast = build(model, inputs=(torch.randn(4, 5), scale := torch.randn(8)))
    for batch in (4, 1, 8):
        x = torch.randn(batch, 5)
        torch.testing.assert_close(fast(x, scale), model(x, scale))
    with refused(InputError, where="SparseModule", expected="(8,) on cpu", got="(9,)", do="Compile again"):
        fast(torch.randn(4, 5), torch.randn(9))


def test_an_input_that_has_the_batch_s_size_by_chance() -> None:
    model = Function(lambda m, x, scale: m.b(m.a(x) * scale))
    fast = build(model, inputs=(torch.randn(1, 5), scale := torch.randn(1, 8)))
    with refused(InputError, where="SparseModule", expected="one batch size", got="[1, 4]", do="of another batch size"):
        fast(torch.randn(4, 5), scale)


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


def padding(first: int) -> Tensor:
    """Of three sequences of ten, the second one from `first` on."""
    return (torch.arange(3) == 1)[:, None] & (torch.arange(10) >= first)


def test_an_encoder_whose_padded_positions_are_zero_without_gradients() -> None:
    """And the advice: then PyTorch computes what the graph does, whatever the padding."""
    model, x = encoder(), torch.randn(3, 10, 16)
    example = {"src": x, "src_key_padding_mask": padding(10)}
    with refused(CaptureError, where="TransformerEncoder", expected="with and without gradients",
                 got="use_nested_tensor=True", do="encoder.use_nested_tensor = False"):  # fmt: skip
        build(model, inputs=example)
    assert not model._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()
    model.use_nested_tensor = False
    fast = build(model, inputs=example)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, src_key_padding_mask=padding(7)), model(x, src_key_padding_mask=padding(7)))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_a_causal_mask_that_is_an_input(options: dict[str, bool]) -> None:
    """The graph looks at no mask, and the reference is no fused kernel, which gives other values under a random one."""
    model, x = encoder(), torch.randn(3, 10, 16)
    given = {"src": x, "mask": nn.Transformer.generate_square_subsequent_mask(10), **options}
    fast = build(model, inputs=given, dynamic_batch=False)
    detect = torch.nn.modules.transformer._detect_is_causal_mask
    with torch.no_grad():
        torch.testing.assert_close(fast(**given), model(**given))
    assert detect(given["mask"], None, 10)


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_a_model_with_everything_masked_is_a_constant_and_right(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    masks = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    x = torch.randn(batch, 2, 8, 8)
    fast = build(model, masks, inputs=torch.randn(2, 2, 8, 8))
    assert torch.equal(fast(x), torch.zeros(batch, 3))
    del masks["4.bias"]
    fast = build(model, masks, inputs=torch.randn(2, 2, 8, 8))
    assert torch.equal(fast(x), model[4].bias.detach().expand(batch, 3))


ERRORS = [
    kind("the place", expected="a thing", got="another", do="Do this.")
    for kind in (FxSparseError, CaptureError, InputError, MaskError, TargetError, VerificationError)
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_error_survives_pickling_with_all_its_parts(error: FxSparseError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "the place: expected a thing; got another.\n  Do this."
    assert (copy.where, copy.expected, copy.got, copy.do) == ("the place", "a thing", "another", "Do this.")


def test_an_error_crosses_a_process() -> None:
    code = (
        "import pickle, sys; from fxsparse import MaskError;"
        "sys.stdout.buffer.write(pickle.dumps(MaskError('w', expected='e', got='g', do='d')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parents[1])
    assert str(pickle.loads(done.stdout)) == "w: expected e; got g.\n  d"


def test_near_names_are_the_near_ones() -> None:
    assert near("conv1.wieght", ["conv1.weight", "fc.bias"]) == "Did you mean 'conv1.weight'?"
    assert near("zzz", ["conv1.weight"]) == ""
    assert near("a", []) == ""
