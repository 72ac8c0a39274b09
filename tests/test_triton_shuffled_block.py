"""The Triton kernel of shuffled blocks against float64, in Triton's interpreter and, marked `gpu`, on a device.

Triton decides when it is first imported whether it interprets, and other tests import it first. So each device has a
process of its own, started with the right setting, and a test sends it cases: `cpu` interprets, `cuda` does not.
The interpreter of Triton 3.6 (torch 2.11) needs NumPy < 2.4.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fxsparse.errors import InputError, TargetError
from fxsparse.kernels import triton as kernels
from fxsparse.kernels.triton import ACTIVATIONS, Tiles, shuffled_block_conv2d, shuffled_block_linear

Run = Callable[..., Any]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """run(function, case): function(case, device) in the device's own process."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with worker(interpret=request.param == "cpu") as pool:
        yield lambda function, *args: pool.submit(function, *args, request.param).result()


@pytest.fixture(scope="module")
def native() -> Iterator[Run]:
    """native(function, ...) in a process where Triton compiles and does not interpret; it needs no device for that."""
    with worker(interpret=False) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def worker(*, interpret: bool) -> ProcessPoolExecutor:
    before = os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {"TRITON_INTERPRET": "1"} if interpret else {}
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()  # starts the process
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ |= {} if before is None else {"TRITON_INTERPRET": before}
    return pool


@dataclass(frozen=True)
class Case:
    """`groups` are (rows, kept columns) each; what is left of out_channels is in no group."""

    groups: tuple[tuple[int, int], ...] = ((16, 40), (32, 24))
    batch: int = 2
    size: tuple[int, int] = (7, 6)
    channels: int = 8
    out_channels: int = 50
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    dtype: torch.dtype = torch.float32
    tiles: Tiles | str | None = None
    seed: int = 0
    window: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        object.__setattr__(self, "window", window)


def pack(groups: list[tuple[Tensor, Tensor]], weight: Tensor) -> tuple[Tensor, ...]:
    """The format in a few lines: groups of (rows, columns), and weight [O, kH * kW * I] with taps outermost."""
    values = []
    for rows, columns in groups:
        matrix = torch.zeros(len(columns), -(-len(rows) // 16) * 16)
        matrix[:, : len(rows)] = weight[rows][:, columns].T
        values.append(matrix.flatten())

    def joined(parts: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([0, *(part.numel() for part in parts)])
        return torch.cat([torch.empty(0), *parts]).to(dtype), lengths.cumsum(0)

    rows, row_ptr = joined([r for r, _ in groups], torch.int32)
    columns, column_ptr = joined([c for _, c in groups], torch.int32)
    packed_values, value_ptr = joined(values, weight.dtype)
    return rows, row_ptr.int(), columns, column_ptr.int(), packed_values, value_ptr


def build(case: Case) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor | None, Tensor]:
    """x NHWC, the packed weight, the same weight [O, I, kH, kW], bias, and noise for the residual."""
    g = torch.Generator().manual_seed(case.seed)
    width = case.kernel[0] * case.kernel[1] * case.channels
    order, groups = torch.randperm(case.out_channels, generator=g), []
    dense = torch.randn(case.out_channels, width, generator=g).to(case.dtype)
    kept = torch.zeros(case.out_channels, width, dtype=torch.bool)
    for rows, columns in case.groups:
        mine, order = order[:rows], order[rows:]
        groups.append((mine, torch.randperm(width, generator=g)[:columns].sort().values))
        kept[mine[:, None], groups[-1][1]] = True
    weight = (dense * kept).reshape(case.out_channels, *case.kernel, case.channels).permute(0, 3, 1, 2)
    x = torch.randn(case.batch, *case.size, case.channels, generator=g).to(case.dtype)
    bias = torch.randn(case.out_channels, generator=g).to(case.dtype) if case.bias else None
    return x, pack(groups, dense), weight.contiguous(), bias, torch.randn(1 << 16, generator=g).to(case.dtype)


def dense(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The same by torch's own convolution, in the dtype of x."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, **case.window).permute(0, 2, 3, 1)
    for term in (bias, residual):
        y = y if term is None else y + term
    return ACTIVATIONS[case.activation](y).contiguous()


def errors(case: Case, device: str) -> tuple[float, float]:
    """The kernel's largest error, and what is allowed: see `check`. Runs in the device's process."""
    torch.backends.cudnn.allow_tf32 = False
    x, packed, weight, bias, noise = build(case)
    exact = [None if t is None else t.double() for t in (weight, bias)]
    shape = dense(case, x.double(), exact[0], exact[1], None).shape
    residual = noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape) if case.residual else None
    reference = dense(case, x.double(), exact[0], exact[1], None if residual is None else residual.double())
    magnitude = F.conv2d(x.double().abs().permute(0, 3, 1, 2), exact[0].abs(), None, **case.window)
    arguments = [None if t is None else t.to(device) for t in (x, weight, bias, residual)]
    own = (dense(case, *arguments).cpu() - reference).abs().max().item() if reference.numel() else 0.0
    y = shuffled_block_conv2d(
        arguments[0], *(t.to(device) for t in packed), arguments[2], arguments[3], case.activation,
        kernel=case.kernel, out_channels=case.out_channels, tiles=case.tiles, **case.window,
    )  # fmt: skip
    assert (y.shape, y.dtype, y.is_contiguous()) == (shape, case.dtype, True)
    if not y.numel():
        return 0.0, 0.0
    unit = torch.finfo(case.dtype).eps * reference.abs().max() + torch.finfo(torch.float32).eps * magnitude.max()
    return (y.cpu() - reference).abs().max().item(), 2 * own + unit.item()


def check(run: Run, case: Case) -> None:
    """Within twice the dense op's own error, plus one unit: a dense op of few outputs may be exact by luck."""
    error, allowed = run(errors, case)
    assert error <= allowed, (error, allowed, case)


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 5)]))
    channels, dilation = draw(st.integers(1, 24)), draw(PAIRS)
    columns = st.integers(0, channels * kernel[0] * kernel[1])
    rows = st.sampled_from([1, 2, 15, 16, 17, 32, 48, 64, 65, 128, 130])
    groups = draw(st.lists(st.tuples(rows, columns), max_size=3))
    window = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    return Case(
        tuple(groups),
        batch=draw(st.integers(1, 2)),
        size=(window[0] + draw(st.integers(0, 5)), window[1] + draw(st.integers(0, 5))),
        channels=channels,
        out_channels=max(1, sum(r for r, _ in groups) + draw(st.sampled_from([0, 0, 1, 20]))),
        kernel=kernel,
        stride=draw(PAIRS),
        padding=draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        dilation=dilation,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        dtype=draw(st.sampled_from(DTYPES)),
        tiles=draw(st.sampled_from([None, Tiles(16, 16, 16), Tiles(64, 32, 32), Tiles(128, 64, 64)])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_shape_agrees_with_float64(run: Run, case: Case) -> None:
    check(run, case)


SPECIAL = {
    "one row": Case(((1, 9),), out_channels=1),
    "no group": Case(()),
    "no column": Case(((16, 0), (34, 0)), residual=True, activation="silu"),
    "one group without columns": Case(((16, 0), (34, 72))),
    "every column of every row": Case(((50, 72),)),
    "groups of very different width": Case(((100, 30), (1, 5), (16, 72)), 1, out_channels=117, tiles=Tiles(32, 16, 32)),
    "no image": Case(batch=0),
    "even kernel, uneven everything": Case(size=(9, 4), kernel=(2, 4), stride=(3, 1), padding=(0, 3), dilation=(2, 1)),
    "padding without taps": Case(((16, 8),), kernel=(1, 1), padding=(2, 1), stride=(2, 2)),
    "wide kernel": Case(((16, 200),), 1, (3, 40), 2, kernel=(3, 35), padding=(1, 17)),
    "first candidate of autotune": Case(((64, 50), (64, 20)), out_channels=128, tiles="autotune"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_shapes_agree_with_float64(run: Run, name: str, dtype: torch.dtype) -> None:
    check(run, replace(SPECIAL[name], dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_epilogue_agrees_with_float64(run: Run, bias: bool, residual: bool, activation: str) -> None:
    for dtype in DTYPES:
        check(run, Case(size=(4, 3), bias=bias, residual=residual, activation=activation, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_the_row_groups_it_is_made_for_agree_with_float64(run: Run, rows: int, dtype: torch.dtype) -> None:
    check(run, Case(((rows, 70), (rows, 33)), channels=24, out_channels=2 * rows, dtype=dtype))


def linear_errors(case: Case, device: str) -> tuple[float, float]:
    x, packed, weight, bias, noise = build(case)
    x, weight, residual = x[:, :, 0], weight[:, :, 0, 0], noise[: case.batch * case.size[0] * case.out_channels]
    residual = residual.view(*x.shape[:-1], case.out_channels)
    arguments = [t.to(device) for t in packed]
    reference = F.gelu(F.linear(x.double(), weight.double(), bias.double()) + residual.double())
    own = F.gelu(F.linear(x, weight, bias) + residual) - reference
    y = shuffled_block_linear(
        x.to(device), *arguments, bias.to(device), residual.to(device), "gelu", out_features=case.out_channels
    )
    assert (y.shape, y.dtype) == (reference.shape, x.dtype)
    unit = torch.finfo(x.dtype).eps * reference.abs().max().item()
    return (y.cpu() - reference).abs().max().item(), 2 * own.abs().max().item() + unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_agrees_with_float64(run: Run, dtype: torch.dtype) -> None:
    case = Case(((64, 30), (3, 100)), 2, (5, 1), 100, 70, kernel=(1, 1), padding=(0, 0), dtype=dtype)
    error, allowed = run(linear_errors, case)
    assert error <= allowed


def nan_through(activation: str, device: str) -> bool:
    case = Case(((16, 8),), out_channels=16, kernel=(1, 1), padding=(0, 0), activation=activation)
    x, packed, *_ = build(case)
    x[0, 0, 0] = torch.nan
    tensors = [t.to(device) for t in (x, *packed)]
    y = shuffled_block_conv2d(*tensors, activation=activation, kernel=(1, 1), out_channels=16)
    return bool(y[0, 0, 0].isnan().all()) and bool(y[0, 1:].isfinite().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_comes_through_as_it_does_in_torch(run: Run, activation: str) -> None:
    assert run(nan_through, activation)


def infinity_unread(device: str) -> bool:
    x, weight = torch.ones(1, 2, 2, 8), torch.ones(16, 8)
    x[..., 0] = torch.inf
    packed = pack([(torch.arange(16), torch.arange(1, 6))], weight)
    y = shuffled_block_conv2d(*(t.to(device) for t in (x, *packed)), kernel=(1, 1), out_channels=16)
    return bool((y == 5).all())


def test_an_infinity_that_no_group_reads_stays_out_of_the_padding_of_a_tile(run: Run) -> None:
    assert run(infinity_unread)


def compiled(name: str, cache: str, dtype: str, precision: str, capability: int, stage: str = "ptx") -> str:
    """PTX, or an earlier stage, for a device that need not be here.

    The interpreter knows nothing of types, layouts or tensor cores.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"fxsparse.kernels.triton.{name}"), name)
    constants: dict[str, Any] = {
        "KERNEL_H": 3, "KERNEL_W": 3, "BORDER": True, "ACTIVATION": "gelu", "PRECISION": precision, "WIDEN": False,
        "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "bias": None, "WIDE": False, "SPAN": 8, "VECTOR": 8,
        "TOKENS": 1,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(["x", "values", "y", "residual"], f"*{dtype}") | {"value_ptr": "*i64"}
    types |= dict.fromkeys(["rows", "row_ptr", "columns", "column_ptr"], "*i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    os.environ["TRITON_CACHE_DIR"] = cache
    source = ASTSource(kernel, signature, constants)
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm[stage])


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA comes with Linux builds only")
@pytest.mark.parametrize("name", ["shuffled_block", "transposed"])
def test_it_compiles_to_tensor_cores_and_to_tf32_only_when_told(native: Run, tmp_path: Path, name: str) -> None:
    wanted = {
        ("bf16", "ieee", 90): {("wgmma", "bf16.bf16")},
        ("fp32", "tf32", 80): {("mma", "tf32.tf32")},
        ("fp32", "ieee", 80): set(),
    }
    ptx = {arguments: native(compiled, name, str(tmp_path), *arguments) for arguments in wanted}
    found = {key: set(re.findall(r"(w?g?mma)\.\S*?(f16\.f16|bf16\.bf16|tf32\.tf32)", ptx[key])) for key in ptx}
    assert found == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA comes with Linux builds only")
def test_values_for_few_tokens_are_fetched_ahead(native: Run, tmp_path: Path) -> None:
    assert "cp.async" in native(compiled, "few", str(tmp_path), "bf16", "ieee", 90)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA comes with Linux builds only")
def test_offsets_of_few_tokens_have_64_bits(native: Run, tmp_path: Path) -> None:
    """Where the batch is open x, or the parts of y, may come to have more elements than 31 bits count."""
    offsets = re.findall(r"tt\.addptr .*", native(compiled, "few", str(tmp_path), "bf16", "ieee", 90, "ttir"))
    assert [("i64" in line) for line in offsets if "%x," in line] == [True]
    assert "i64" in offsets[-1]  # where y is written


def precision(allowed: bool, device: str) -> str:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        return import_module("fxsparse.kernels.triton.shuffled_block").precision()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_tf32_follows_the_switch_of_torch(run: Run) -> None:
    assert [run(precision, allowed) for allowed in (False, True)] == ["ieee", "tf32"]


def choices(device: str) -> list[tuple[int, ...]]:
    module = import_module("fxsparse.kernels.triton.shuffled_block")
    return [tuple(module.choose_tiles(rows)) for rows in (3, 32, 64, 300)]


def test_tiles_are_no_wider_than_small_groups(run: Run) -> None:
    assert run(choices) == [(16, rows, 32, 4, 3) for rows in (16, 32, 128, 128)]


def given_wrong(**change: Any) -> dict[str, Any]:
    x, packed, _, bias, _ = build(Case())
    names = ("rows", "row_ptr", "columns", "column_ptr", "values", "value_ptr")
    sizes = {"kernel": (3, 3), "padding": (1, 1), "out_channels": 50}
    return {"x": x, **dict(zip(names, packed, strict=True)), "bias": bias, **sizes} | change


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype of x": ({"x": torch.zeros(1, 4, 4, 8).double()}, "x: expected contiguous float16, bfloat16 or float32"),
    "layout of x": ({"x": torch.zeros(1, 8, 4, 4).permute(0, 2, 3, 1)}, "not contiguous.\n  A channels_last tensor"),
    "dtype of values": ({"values": torch.zeros(9).half()}, "values: expected a contiguous torch.float32 vector on cpu"),
    "dtype of an index": ({"columns": torch.zeros(9).long()}, "columns: expected a contiguous torch.int32 vector"),
    "pointers": ({"row_ptr": torch.zeros(7).int()}, r"groups + 1; got lengths [7, 3, 3]"),
    "activation": ({"activation": "relu7"}, "got 'relu7'.\n  Did you mean 'relu' or 'relu6' or"),
    "bias": ({"bias": torch.zeros(49)}, "bias: expected a contiguous float tensor [50] on cpu; got torch.float32 [49]"),
    "residual": ({"residual": torch.zeros(2, 50, 7, 6)}, "residual: expected a contiguous float tensor [2, 7, 6, 50]"),
    "window": ({"dilation": (5, 1)}, "a window that fits into the padded image; got output [-1, 6]"),
    "kernel": ({"kernel": (3, 61)}, "kernel: expected height + width of at most 63; got (3, 61)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(message)):
        shuffled_block_conv2d(**given_wrong(**change))


def test_an_image_that_32_bits_cannot_count_is_refused() -> None:
    arguments = given_wrong(x=torch.empty(1, 2**16, 2**12, 8, device="meta"))
    arguments |= {name: value.to("meta") for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(InputError, match=r"x: expected images of fewer than 2\*\*31 elements.*\n  Split the batch"):
        shuffled_block_conv2d(**arguments)


def test_a_residual_of_another_shape_is_refused_by_linear() -> None:
    x, packed, *_ = build(Case(kernel=(1, 1), groups=((16, 4),)))
    with pytest.raises(InputError, match=r"residual: expected a contiguous float tensor \[2, 7, 6, 50\]"):
        shuffled_block_linear(x, *packed, residual=torch.zeros(84, 50), out_features=50)


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "fxsparse.kernels.triton.shuffled_block"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kernels, "shuffled_block", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(TargetError, match=r"the package triton; got none installed.\n  Install a build of"):
        shuffled_block_conv2d(**given_wrong())


def refusal_on_a_cpu() -> str:
    with pytest.raises(TargetError) as caught:
        shuffled_block_conv2d(**given_wrong())
    return str(caught.value)


def test_a_cpu_is_refused_when_triton_does_not_interpret(native: Run) -> None:
    message = native(refusal_on_a_cpu)
    assert "expected x on a CUDA device; got x on cpu.\n  Move the tensors, or set TRITON_INTERPRET=1" in message
