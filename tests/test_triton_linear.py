"""The Triton kernels of linear layers: shuffled blocks for many tokens and for few, and the one that turns matrices."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxsparse.errors import InputError
from fxsparse.formats.shuffled_block import pack
from fxsparse.formats.shuffled_block_few import _cuda as few_on_a_gpu
from fxsparse.formats.shuffled_block_few import few
from fxsparse.formats.shuffled_block_gpu import tiled, transposed
from fxsparse.formats.turned import turned
from fxsparse.kernels.triton import ACTIVATIONS, FEW_COLUMNS, Tiles, shuffled_block_few, shuffled_block_transposed
from fxsparse.kernels.triton import turned as turn
from tests.test_shuffled_block import allowed, blocks
from tests.test_triton_shuffled_block import DTYPES, Run, run

__all__ = ["run"]  # a fixture


def errors(
    shape: tuple[int, int, int], rows: int, density: float, dtype: torch.dtype, activation: str, tiles: Tiles | None,
    device: str,
) -> tuple[float, float]:  # fmt: skip
    """The kernel's largest error, and what is allowed. Runs in the device's process."""
    out_features, width, tokens = shape
    weight = blocks((out_features, width), rows, density, 0).to(dtype)
    g = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(s, generator=g).to(dtype) for s in ((width, tokens), (out_features,)))
    arrays = [t.to(device) for t in tiled(pack(weight))]
    y = shuffled_block_transposed(
        x.to(device), *arrays, bias.to(device), activation, out_features=out_features, tiles=tiles
    )
    assert (y.shape, y.dtype, y.is_contiguous()) == ((out_features, tokens), dtype, True)
    act = ACTIVATIONS[activation]
    exact = act(weight.double() @ x.double() + bias.double()[:, None])
    own = act(F.linear(x.t(), weight, bias).t())
    return float((y.cpu().double() - exact).abs().max()) if tokens else 0.0, allowed(own, exact)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_agrees_with_float64(run: Run, data: st.DataObject) -> None:
    arguments = (
        data.draw(st.tuples(st.integers(1, 150), st.integers(1, 80), st.sampled_from([0, 1, 7, 16, 33, 150]))),
        data.draw(st.sampled_from([1, 5, 16, 64, 130])),
        data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from(sorted(ACTIVATIONS))),
        data.draw(st.sampled_from([None, Tiles(16, 16, 16), Tiles(32, 64, 32), Tiles(64, 128, 64, 8)])),
    )
    error, most = run(errors, *arguments)
    assert error <= most, arguments


def test_a_row_in_no_group_is_refused() -> None:
    arrays = tiled(pack(blocks((20, 8), 16, 0.5, 0)))
    with pytest.raises(InputError, match="rows: expected 21 rows; got 20"):
        shuffled_block_transposed(torch.zeros(8, 3), *arrays, out_features=21)


def test_tokens_first_are_refused_with_the_way_out() -> None:
    arrays = tiled(pack(blocks((20, 8), 16, 0.5, 0)))
    with pytest.raises(InputError, match=r"\[tokens, I\]; got .*\n  Flatten what is not features"):
        shuffled_block_few(torch.zeros(3, 1, 8), *arrays, out_features=20)
    with pytest.raises(
        InputError, match=r"\[I, tokens\]; got .*not contiguous.\n  Tokens lie side by side here: x.t\(\)"
    ):
        shuffled_block_transposed(torch.zeros(3, 8).t(), *arrays, out_features=20)


def tiles_for(*shapes: tuple[Any, ...]) -> list[tuple[int, ...]]:
    module = import_module("fxsparse.kernels.triton.transposed")
    return [tuple(module.choose_tiles(*shape)) for shape in shapes[:-1]]  # the last is the device


def test_tiles_are_narrower_where_there_is_little_to_do(run: Run) -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [
        (8192, 32, 128, 999, bf16), (64, 2, 128, 999, bf16), (8192, 64, 64, 99, bf16), (200, 4, 9, 99, bf16),
        (999, 40, 64, 99, fp32),
    ]  # fmt: skip
    assert run(tiles_for, *shapes) == [
        (128, 128, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 32, 4, 3), (64, 16, 32, 4, 4), (128, 64, 16, 4, 3),
    ]  # fmt: skip


def test_groups_with_equal_columns_are_one() -> None:
    packed = pack(blocks((256, 64), 256, 0.3, 0))
    assert packed.groups == 4
    rows, row_ptr, columns, *_ = tiled(packed)
    assert row_ptr.tolist() == [0, 256]
    assert rows.tolist() == list(range(256))
    assert torch.equal(columns, packed.columns[: len(columns)])


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arrays = tiled(pack(blocks((20, 8), 16, 0.5, 0).to(dtype)))
        for bias in (None, torch.randn(20, dtype=dtype)):
            arguments = (torch.randn(8, 2, 5, dtype=dtype), *arrays, bias, 20, "gelu")
            tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(transposed, arguments, test_utils=tests)
        torch.library.opcheck(few, (torch.randn(2, 1, 8, dtype=dtype), *arrays, 20), test_utils=tests)


def errors_of_few(
    shape: tuple[int, int, int], rows: int, density: float, dtype: torch.dtype, device: str
) -> tuple[float, float, int]:
    """The kernel's largest error, what is allowed, and how many parts it has. Runs in the device's process."""
    out_features, width, tokens = shape
    weight = blocks((out_features, width), rows, density, 0).to(dtype)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    arrays = [t.to(device) for t in tiled(pack(weight))]
    parts = shuffled_block_few(x.to(device), *arrays, out_features=out_features)
    assert (parts.shape[1:], parts.dtype) == ((tokens, out_features), torch.float32)
    exact = F.linear(x.double(), weight.double())
    error = (parts.sum(0).to(dtype).cpu().double() - exact).abs()
    return float(error.max()) if tokens else 0.0, allowed(F.linear(x, weight), exact), len(parts)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_few_tokens_agree_with_float64(run: Run, data: st.DataObject) -> None:
    arguments = (
        data.draw(st.tuples(st.integers(1, 200), st.integers(1, 900), st.integers(0, 6))),
        data.draw(st.sampled_from([5, 16, 64, 130])),
        data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        data.draw(st.sampled_from(DTYPES)),
    )
    error, most, _ = run(errors_of_few, *arguments)
    assert error <= most, arguments


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_groups_are_cut_into_parts(run: Run, dtype: torch.dtype) -> None:
    error, most, parts = run(errors_of_few, (64, 2000, 1), 64, 0.5, dtype)
    assert error <= most
    assert parts == 1000 // (2 * FEW_COLUMNS) + 1


def is_turned(shape: tuple[int, int], dtype: torch.dtype, device: str) -> bool:
    """Whether the kernel's result is x turned. Runs in the device's process."""
    x = torch.arange(shape[0] * shape[1]).view(shape).to(dtype)
    y = turn(x.to(device))
    return y.is_contiguous() and torch.equal(y.cpu(), x.t())


@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (200, 1), (64, 128), (3, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_turns(run: Run, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert run(is_turned, shape, dtype)


def test_only_a_matrix_is_turned() -> None:
    for x in (torch.zeros(3), torch.zeros(2, 3, 4)):
        with pytest.raises(InputError, match=r"x: expected a matrix \[rows, columns\]; got .*\n  Flatten"):
            turn(x)


def test_turning_keeps_the_rules_of_torch_library() -> None:
    for first in (True, False):
        for shape in ((3, 5, 8), (8,)):
            tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(turned, (torch.randn(shape), first), test_utils=tests)


def in_64_bits(shape: tuple[int, int, int], device: str) -> tuple[float, float]:
    """As `errors`, with offsets into x counted as if it had more elements than 31 bits count."""
    kernel = import_module("fxsparse.kernels.triton.transposed")
    before, kernel.WIDE_FROM = kernel.WIDE_FROM, 0
    try:
        return errors(shape, 16, 0.5, torch.float32, "none", None, device)
    finally:
        kernel.WIDE_FROM = before


def test_offsets_in_64_bits_are_the_same(run: Run) -> None:
    error, most = run(in_64_bits, (40, 70, 33))
    assert error <= most


def many_of_few(tokens: int, device: str) -> tuple[float, float]:
    """The error of the operator for few tokens, which multiplies more of them as a matrix."""
    weight, x = blocks((64, 300), 64, 0.5, 0), torch.randn(tokens, 2, 300, generator=torch.Generator().manual_seed(1))
    arrays = [t.to(device) for t in tiled(pack(weight))]
    y = few_on_a_gpu(x.to(device), *arrays, 64).sum(0).cpu()
    exact = F.linear(x.double(), weight.double())
    return float((y.double() - exact).abs().max()), allowed(F.linear(x, weight), exact)


@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
def test_many_tokens_may_come_to_the_operator_for_few(run: Run, tokens: int) -> None:
    error, most = run(many_of_few, tokens)
    assert error <= most
