"""The shuffled-block format and its CPU kernel, against float64 and against PyTorch's own operators."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxsparse.errors import InputError, TargetError
from fxsparse.formats import FORMATS
from fxsparse.formats import shuffled_block_op as op
from fxsparse.formats.grouping import cost, group_rows
from fxsparse.formats.shuffled_block import ARRAYS, ShuffledBlock, pack, split, unpack
from fxsparse.formats.shuffled_block_layer import fold, unfold
from fxsparse.formats.shuffled_block_op import multiply, reference, shuffled_block, shuffled_block_into
from fxsparse.kernels import build
from fxsparse.kernels.cpu import shuffled_block as kernel
from fxsparse.kernels.shared import LANES

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "hardswish")
# what another order of summation may add to the dense operator's own error: both are maxima of something random
SLACK, FLOOR_ULP = 2.0, 4.0


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def blocks(shape: tuple[int, ...], rows: int, density: float, seed: int) -> Tensor:
    """A random weight whose rows, shuffled, form groups of `rows` with columns of their own; some groups are empty."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randn(shape[0], int(np.prod(shape[1:])), generator=g)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    for group in torch.randperm(shape[0], generator=g).split(rows):
        mask[group] = torch.rand(flat.shape[1], generator=g) < density
    return (flat * mask).view(shape)


def dense(x: Tensor, w: Tensor, geometry: dict[str, tuple[int, int]]) -> Tensor:
    """Channels last in and out. bfloat16 in float32 and rounded once: torch 2.14's own conv2d sometimes crashes there,
    as on x [3, 31, 3, 1] with a 1x1 kernel, stride (1, 2), padding 1 and dilation 2.
    """
    if w.dim() == 2:
        return F.linear(x, w)
    if x.dtype == torch.bfloat16:
        return dense(x.float(), w.float(), geometry).bfloat16()
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, w, None, **geometry).permute(0, 2, 3, 1)


def allowed(y: Tensor, exact: Tensor) -> float:
    """Twice the error of the dense operator `y`, and a few units in the last place of the largest output."""
    own = float((y.double() - exact).abs().max()) if exact.numel() else 0.0
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    return SLACK * own + FLOOR_ULP * torch.finfo(y.dtype).eps * scale


def agrees(w: Tensor, x: Tensor, geometry: dict[str, tuple[int, int]], **epilogue: object) -> None:
    """With rows in vector lanes, and with pixels."""
    bias, residual, activation = (epilogue.get(k) for k in ("bias", "residual", "activation"))

    def finish(y: Tensor) -> Tensor:
        y = y if bias is None else y + bias.to(y.dtype)  # type: ignore[attr-defined]
        y = y if residual is None else y + residual.to(y.dtype)  # type: ignore[attr-defined]
        return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish}.get(
            str(activation), lambda y: y
        )(y)

    exact = finish(dense(x.double(), w.double(), geometry))
    own = finish(dense(x, w, geometry))
    for lanes in LANES:
        got = multiply(pack(w, lanes=lanes), x, **geometry, **epilogue)  # type: ignore[arg-type]
        assert got.shape == exact.shape
        assert got.dtype == x.dtype
        assert got.is_contiguous()
        off = float((got.double() - exact).abs().max()) if exact.numel() else 0.0
        assert off <= allowed(own, exact), f"{lanes} off by {off:.2e}, allowed {allowed(own, exact):.2e}"


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, tuple[int, int]]]:
    kernel_size = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 2), (7, 7)]))
    stride, dilation = (draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) for _ in range(2))
    padding = (draw(st.integers(0, kernel_size[0])), draw(st.integers(0, kernel_size[1])))
    least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel_size, padding, strict=True)]
    size = [draw(st.integers(max(1, low), max(1, low) + 14)) for low in least]
    channels, rows = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    seed = draw(st.integers(0, 2**31))
    w = blocks((rows, channels, *kernel_size), draw(st.sampled_from([1, 3, 16, 32, 64, 200])),
               draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), seed)  # fmt: skip
    x = torch.randn(draw(st.integers(1, 6)), *size, channels, generator=torch.Generator().manual_seed(seed))
    return w, x, {"stride": stride, "padding": padding, "dilation": dilation}


@settings(max_examples=80, deadline=None)
@given(convolutions(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_convolution_agrees_with_the_dense_one(
    case: tuple[Tensor, Tensor, dict[str, tuple[int, int]]], dtype: torch.dtype
) -> None:
    w, x, geometry = case[0].to(dtype), case[1].to(dtype), case[2]
    assert all(torch.equal(unpack(pack(w, lanes=lanes)), w) for lanes in LANES)
    agrees(w, x, geometry)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 200), st.lists(st.integers(1, 9), min_size=0, max_size=3), st.integers(0, 99)
)
def test_any_linear_layer_agrees_with_the_dense_one(rows: int, columns: int, lead: list[int], seed: int) -> None:
    w = blocks((rows, columns), 32, 0.3, seed)
    agrees(w, torch.randn(*lead, columns, generator=torch.Generator().manual_seed(seed)), {})


# The corners: images read in place with border strips, several bands, long sums, many groups, odd widths.
REAL = [
    ((64, 64, 3, 3), (1, 56, 56, 64), 1, 1), ((24, 3, 7, 7), (2, 224, 224, 3), 2, 3),
    ((512, 512, 3, 3), (1, 7, 7, 512), 1, 1), ((2048, 512, 1, 1), (1, 7, 7, 512), 1, 0),
    ((256, 128, 3, 3), (1, 57, 55, 128), 2, 1), ((128, 96, 1, 1), (33, 5, 3, 96), 1, 0),
    ((64, 64, 1, 1), (2, 56, 56, 64), 2, 0), ((16, 64, 3, 3), (1, 113, 130, 64), 1, 1),
    # several images at once: a pixel of each in a line, or line by line; copied, in place, with borders
    ((512, 512, 3, 3), (17, 2, 2, 512), 1, 1), ((512, 256, 3, 3), (5, 4, 3, 256), 2, 1),
    ((512, 512, 3, 3), (3, 7, 7, 512), 1, 1), ((256, 256, 3, 3), (4, 15, 14, 256), 1, 1),
    ((512, 1024, 1, 1), (6, 7, 5, 1024), 2, 0), ((300, 512, 3, 3), (9, 1, 1, 512), 1, 1),
    # every second pixel picked out of many images, the last line short
    ((512, 1024, 1, 1), (5, 13, 9, 1024), 2, 0),
    # narrow images of several bands, each copied; many pointwise pixels, the last line short
    ((48, 512, 3, 3), (1, 30, 31, 512), 1, 1), ((33, 300, 5, 5), (2, 39, 21, 300), 2, 2),
    ((80, 96, 1, 1), (1, 37, 41, 96), 1, 0),
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("shape", "size", "stride", "padding"), REAL)
def test_real_layers_agree(
    shape: tuple[int, ...], size: tuple[int, ...], stride: int, padding: int, threads: int
) -> None:
    with torch_threads(threads):
        w, x = blocks(shape, 32, 0.26, 0), torch.randn(size, generator=torch.Generator().manual_seed(1))
        agrees(w, x, {"stride": (stride, stride), "padding": (padding, padding)})


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "size", "stride", "padding"), [*REAL, ((130, 40, 1, 1), (1, 1, 197, 40), 1, 0)])
def test_rows_are_summed_up_alike_wherever_they_lie(
    shape: tuple[int, ...], size: tuple[int, ...], stride: int, padding: int, dtype: torch.dtype, threads: int
) -> None:
    """Bit for bit: rows of a group that follow each other, and the same rows all over the layer."""
    g = torch.Generator().manual_seed(0)
    scattered, order = blocks(shape, 32, 0.26, 0), torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))
    place = torch.cat([group.sort().values for group in order.split(32)])
    together = scattered[place]
    x, bias = torch.randn(size, generator=g).to(dtype), torch.randn(shape[0], generator=g).to(dtype)
    with torch_threads(threads):
        geometry: dict[str, Any] = {"stride": (stride, stride), "padding": (padding, padding)}
        plain = multiply(pack(scattered.to(dtype)), x, bias, **geometry)
        residual = torch.randn(plain.shape, generator=g).to(dtype)
        for extra, activation in ((None, "none"), (residual, "relu"), (residual, "silu")):
            got = multiply(pack(scattered.to(dtype)), x, bias, extra, activation=activation, **geometry)
            moved = None if extra is None else extra[..., place].contiguous()
            expected = multiply(pack(together.to(dtype)), x, bias[place], moved, activation=activation, **geometry)
            assert torch.equal(got[..., place], expected), activation


@pytest.mark.parametrize("rows", [32, 300])  # scattered, and all in order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel_size", "size"), [(3, (2, 17, 19, 64)), (1, (1, 30, 31, 64)), (3, (9, 2, 2, 64))])
def test_a_sum_may_take_the_place_of_its_residual(
    kernel_size: int, size: tuple[int, ...], dtype: torch.dtype, rows: int
) -> None:
    g = torch.Generator().manual_seed(0)
    packed = op.as_run(pack(blocks((300, 64, kernel_size, kernel_size), rows, 0.3, 0).to(dtype)))
    x, y = torch.randn(size, generator=g).to(dtype), torch.randn(*size[:3], 300, generator=g).to(dtype)
    windows = [[1, 1], [kernel_size // 2] * 2, [1, 1]]
    expected = multiply(packed, x, None, y, padding=windows[1], activation="relu")
    shuffled_block_into(x, packed.values, fold(packed.tensors, None, packed.shape, windows, "relu"), y, y)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 6, 16, 20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_bias_residual_and_activation_are_fused(activation: str, rows: int, dtype: torch.dtype, residual: bool) -> None:
    g = torch.Generator().manual_seed(0)
    w, x = blocks((80, 24, 3, 3), rows, 0.4, 3).to(dtype), torch.randn(2, 9, 11, 24, generator=g).to(dtype)
    extra = torch.randn(2, 9, 11, 80, generator=g).to(dtype) if residual else None
    bias = torch.randn(80, generator=g).to(dtype)
    agrees(w, x, {"padding": (1, 1)}, bias=bias, residual=extra, activation=activation)


@pytest.mark.parametrize("activation", ["silu", "gelu", "hardswish", "relu6"])
def test_an_activation_is_right_over_its_whole_range(activation: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e38, -1e38])])[:, None]
    function = {"silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish, "relu6": F.relu6}[activation]
    for lanes in LANES:
        got = multiply(pack(torch.ones(16, 1), lanes=lanes), x, activation=activation)[:, 0]
        torch.testing.assert_close(got, function(x[:, 0].double()).float(), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation: str, lanes: str) -> None:
    x = torch.full((3, 20), torch.nan)
    assert multiply(pack(torch.ones(40, 20), lanes=lanes), x, activation=activation).isnan().all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "atol"), [((2, 20, 13, 23), 1e-5), ((1, 39, 21, 300), 1e-4)])
def test_narrower_vectors_give_the_same(
    isa: str, dtype: torch.dtype, size: tuple[int, ...], atol: float, lanes: str
) -> None:
    if list(build._ISA).index(isa) < list(build._ISA).index(build.instruction_set()):
        pytest.skip(f"this processor has no {isa}")
    w, x = blocks((100, size[3], 3, 3), 32, 0.4, 0).to(dtype), torch.randn(size).to(dtype)
    packed, y = pack(w, lanes=lanes), torch.empty(*size[:3], 100, dtype=dtype)
    kernel.run(x, y, packed.tensors, None, None, ((3, 3), (1, 1), (1, 1), (1, 1)), "relu", lanes, isa)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    expected = multiply(packed, x, padding=(1, 1), activation="relu")
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_picked_with_any_vectors(dtype: torch.dtype) -> None:
    """Many weights and a stride; lines of pixels from several images, the last one short."""
    w = blocks((512, 1024, 1, 1), 32, 0.3, 0).to(dtype)
    x, residual = (torch.randn(5, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
                   for size in ((13, 9, 1024), (7, 5, 512)))  # fmt: skip
    agrees(w, x, {"stride": (2, 2)}, residual=residual, activation="relu")
    packed, y = pack(w), torch.empty_like(residual)
    expected = multiply(packed, x, None, residual, stride=(2, 2), activation="relu")
    for isa in list(build._ISA)[list(build._ISA).index(build.instruction_set()) + 1 :]:
        kernel.run(x, y, packed.tensors, None, residual, ((1, 1), (2, 2), (0, 0), (1, 1)), "relu", "rows", isa)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            y, expected, rtol=tolerance, atol=10 * tolerance, msg=lambda m, isa=isa: f"{isa}: {m}"
        )


def test_a_batch_of_nothing_gives_nothing() -> None:
    assert multiply(pack(torch.ones(4, 3, 3, 3)), torch.empty(0, 8, 8, 3), padding=(1, 1)).shape == (0, 8, 8, 4)


@pytest.mark.parametrize("lanes", LANES)
def test_rows_without_weights_hold_the_epilogue_alone(lanes: str) -> None:
    w = torch.zeros(40, 8)
    w[3] = 1
    bias = torch.arange(40.0) - 20
    y = multiply(pack(w, lanes=lanes), torch.ones(2, 8), bias, activation="relu")
    expected = F.relu(F.linear(torch.ones(2, 8), w, bias))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_dtype_without_a_kernel_runs_dense(dtype: torch.dtype) -> None:
    w, x = blocks((20, 6, 3, 3), 16, 0.5, 0).to(dtype), torch.randn(1, 5, 5, 6).to(dtype)
    assert torch.equal(multiply(pack(w), x), dense(x, w, {}).contiguous())


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    packed = pack(blocks((20, 6, 3, 3), 16, 0.5, 0))
    sizes = ([20, 6, 3, 3], [1, 1], [1, 1], [1, 1], "relu", "rows")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x = torch.randn(2, 7, 5, 6)
    for bias, residual in ((None, None), (torch.randn(20), torch.randn(2, 7, 5, 20))):
        torch.library.opcheck(shuffled_block, (x, *packed.tensors, bias, residual, *sizes), test_utils=tests)


@pytest.mark.parametrize("lanes", LANES)
def test_an_input_that_is_not_contiguous_is_read_right(lanes: str) -> None:
    packed, x = pack(blocks((20, 6, 3, 3), 16, 0.5, 0), lanes=lanes), torch.randn(2, 7, 6, 5).transpose(2, 3)
    assert torch.equal(multiply(packed, x), multiply(packed, x.contiguous()))


@seed(20261127)
@settings(max_examples=60, deadline=None)
@given(
    c=st.integers(1, 17), o=st.integers(1, 90), n=st.sampled_from([1, 3]), h=st.integers(1, 60), w=st.integers(1, 90),
    kernel=st.sampled_from([(1, 1), (3, 3), (7, 7), (2, 5)]), stride=st.integers(1, 3), padding=st.integers(0, 3),
    dilation=st.integers(1, 2), dtype=st.sampled_from([torch.float32, torch.bfloat16]), lanes=st.sampled_from(LANES),
)  # fmt: skip
def test_images_with_channels_first_are_read_as_they_are(
    c: int, o: int, n: int, h: int, w: int, kernel: tuple[int, int], stride: int, padding: int, dilation: int,
    dtype: torch.dtype, lanes: str,
) -> None:  # fmt: skip
    """Whole numbers, so that every order of summing gives the same; through both operators."""
    assume(all(size + 2 * padding > (k - 1) * dilation for size, k in zip((h, w), kernel, strict=True)))
    g = torch.Generator().manual_seed(c * o + h)
    whole = [torch.randint(-2, 3, size, generator=g).to(dtype) for size in ((n, c, h, w), (o, c, *kernel), (o,))]
    image, weight, bias = whole
    pairs = [[stride] * 2, [padding] * 2, [dilation] * 2]
    expected = F.conv2d(*(t.double() for t in whole), *pairs).permute(0, 2, 3, 1).to(dtype)
    packed, x = pack(weight, lanes=lanes), image.permute(0, 2, 3, 1)
    names = ("stride", "padding", "dilation")
    assert torch.equal(multiply(packed, x, bias, **dict(zip(names, pairs, strict=True))), expected)
    out = torch.empty_like(expected, memory_format=torch.contiguous_format)
    shuffled_block_into(x, packed.values, fold(packed.tensors, bias, packed.shape, pairs, "none", lanes), None, out)
    assert torch.equal(out, expected)


def test_a_large_padding_around_channels_first_is_refused_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an image it counts with 32 bits."""
    monkeypatch.setattr(op, "LARGEST_IMAGE", 6 * 9 * 11)
    x = torch.randn(2, 6, 7, 9).permute(0, 2, 3, 1)
    assert [op._channels_first(x, (1, 1)), op._channels_first(x, (1, 2))] == [True, False]


def test_the_reference_and_the_kernel_agree() -> None:
    packed, x = pack(blocks((20, 6, 3, 3), 16, 0.5, 0)), torch.randn(2, 7, 5, 6)
    arguments = (*packed.tensors, None, None, [20, 6, 3, 3], [1, 1], [0, 0], [1, 1], "none", "rows")
    torch.testing.assert_close(shuffled_block(x, *arguments), reference(x, *arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_on_a_gpu_agrees_with_the_dense_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape, size, p in (((64, 24, 3, 3), (2, 20, 13, 24), 1), ((100, 40), (3, 7, 40), 0)):
        w, x = blocks(shape, 64, 0.4, 0).to(dtype), torch.randn(size).to(dtype)
        packed = pack(w.float())  # the Triton kernel takes no pairs
        tensors = [t.cuda() for t in packed.tensors]
        y = shuffled_block(x.cuda(), *tensors, None, None, list(shape), [1, 1], [p, p], [1, 1], "relu", "rows")
        exact = F.relu(dense(x.double(), w.double(), {"padding": (p, p)} if p else {}))
        own = F.relu(dense(x, w, {"padding": (p, p)} if p else {}))
        assert float((y.cpu().double() - exact).abs().max()) <= allowed(own, exact)


# ------------------------------------------------------------ grouping


def test_shuffled_groups_are_found_again() -> None:
    w = blocks((256, 64, 3, 3), 32, 0.2, 5)
    packed = pack(w)
    assert packed.groups == 8
    assert packed.nse == int((w != 0).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 60), st.floats(0, 1), st.integers(0, 999))
def test_groups_hold_every_row_with_a_nonzero_once(rows: int, columns: int, density: float, seed: int) -> None:
    used = np.random.default_rng(seed).random((rows, columns)) < density
    groups = group_rows(used)
    found = np.concatenate([*groups, np.zeros(0, np.int64)])
    assert sorted(found) == np.flatnonzero(used.any(1)).tolist()
    assert all(len(g) <= 64 and (np.diff(g) > 0).all() for g in groups)


@pytest.mark.parametrize("lanes", LANES)
def test_merging_never_costs_more_than_rows_with_equal_columns_alone(lanes: str) -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.2, 0.9):
        used = rng.random((200, 300)) < density
        merged = sum(float(cost(len(g), int(used[g].any(0).sum()), lanes)) for g in group_rows(used, lanes))
        assert merged <= sum(float(cost(1, int(row.sum()), lanes)) for row in used if row.any())


def test_many_different_rows_are_gathered_and_still_exact() -> None:
    w = torch.randn(700, 90) * (torch.rand(700, 90, generator=torch.Generator().manual_seed(0)) < 0.03)
    packed, single = pack(w), pack(w, lanes="pixels")
    assert torch.equal(unpack(packed), w)
    assert packed.groups < 50
    assert torch.equal(unpack(single), w)
    assert single.nse == int((w != 0).sum()) < packed.nse  # each row by itself: they share too little


@pytest.mark.parametrize("value", [-0.0, 1e-45, torch.nan, torch.inf])
def test_only_a_true_zero_is_left_out(value: float) -> None:
    w = torch.zeros(20, 5)
    w[7, 3] = value
    assert pack(w).columns.tolist() == ([] if value == 0 else [3])


def test_a_weight_of_zeros_has_one_group_without_columns() -> None:
    for lanes in LANES:
        packed = pack(torch.zeros(5, 4, 3, 3), lanes=lanes)
        assert (packed.groups, packed.nse) == (1, 0)
        assert torch.equal(multiply(packed, torch.ones(1, 3, 3, 4)), torch.zeros(1, 1, 1, 5))


DAMAGE = {
    "column": ("columns", lambda t: t + 10_000),
    "row below": ("rows", lambda t: t - 100),
    "row twice": ("rows", torch.zeros_like),
    "rows of a smaller weight": ("shape", lambda shape: (shape[0] + 1, *shape[1:])),
    "pointers": ("column_ptr", lambda t: t.flip(0)),
    "fewer values": ("values", lambda t: t[:-16]),
    "columns out of order": ("columns", lambda t: t.flip(0)),
    "groups": ("row_ptr", lambda t: t[:-1]),
    "no pointers": ("value_ptr", lambda t: t[:0]),
    "lanes": ("lanes", lambda _: "columns"),
}


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_arrays_are_refused(what: str, lanes: str) -> None:
    packed = pack(blocks((80, 6, 3, 3), 30, 0.5, 0), lanes=lanes)
    name, damage = DAMAGE[what]
    with pytest.raises(InputError, match="expected arrays that fit each other; got "):
        dataclasses.replace(packed, **{name: damage(getattr(packed, name))})


MISFITS: dict[str, tuple[Tensor, dict[str, object], str]] = {
    "too few channels": (torch.ones(1, 8, 8, 3), {}, "x of a .*: expected 6 channels in the last dimension; got"),
    "no image": (torch.ones(8, 6), {}, r"expected \[N, H, W, I\] for a convolution; got shape \(8, 6\)"),
    "an image smaller than the kernel": (torch.ones(1, 2, 2, 6), {}, "expected an image that the 3x3 kernel fits into"),
    "a short bias": (torch.ones(1, 3, 3, 6), {"bias": torch.ones(3)}, r"bias of a .*: expected torch.float32 \[20\]"),
    "a residual of the input's shape": (
        torch.ones(1, 3, 3, 6), {"residual": torch.ones(1, 3, 3, 6)}, r"expected torch.float32 \[1, 1, 1, 20\]; got",
    ),
    "a residual of another dtype": (
        torch.ones(1, 3, 3, 6), {"residual": torch.ones(1, 1, 1, 20).bfloat16()}, r"got torch.bfloat16 \[1, 1, 1, 20\]",
    ),
    "an unknown activation": (torch.ones(1, 3, 3, 6), {"activation": "gleu"}, "Did you mean 'gelu'"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_kernel_would_read_past_the_end_of_is_refused(what: str, dtype: torch.dtype) -> None:
    x, rest, message = MISFITS[what]
    if dtype == torch.float64:  # runs dense; the same rules hold
        message = message.replace("float32", "float64")
        rest = {k: v.double() if isinstance(v, Tensor) and v.dtype == torch.float32 else v for k, v in rest.items()}
    with pytest.raises(InputError, match=message):
        multiply(pack(torch.ones(20, 6, 3, 3).to(dtype)), x.to(dtype), **rest)  # type: ignore[arg-type]


def _folded(packed: ShuffledBlock, bias: Tensor | None, geometry: dict[str, Any], activation: str) -> Tensor:
    defaults = (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
    return fold(packed.tensors, bias, packed.shape, [geometry.get(n, d) for n, d in defaults], activation, packed.lanes)


LAYERS = {
    "a layer that is cut off": lambda layer: layer[:-1],
    "a layer of nothing": lambda layer: layer[:3],
    "a layer of another dtype": lambda layer: layer.double(),
    "a layer of other values": lambda layer: layer.index_fill(0, torch.tensor([14]), 7),
    "a layer with gaps": lambda layer: layer.repeat_interleave(2)[::2],
}
OUTPUTS = {
    "a short output": torch.ones(1, 1, 1, 19),
    "an output of another dtype": torch.ones(1, 1, 1, 20).bfloat16(),
    "an output not contiguous": torch.ones(1, 1, 1, 40)[..., ::2],
}
IN_THE_CALL = [what for what, (_, rest, _) in MISFITS.items() if not rest.keys() & {"bias", "activation"}]


@pytest.mark.parametrize("what", [*IN_THE_CALL, *OUTPUTS, *LAYERS])
def test_the_operator_in_cpp_refuses_the_same(what: str) -> None:
    x, rest, _ = MISFITS.get(what, (torch.ones(1, 3, 3, 6), {}, ""))
    out = OUTPUTS.get(what, torch.ones(*x.shape[:-3], 1, 1, 20))
    packed = pack(torch.ones(20, 6, 3, 3))
    layer = LAYERS.get(what, torch.clone)(_folded(packed, None, {}, "none"))
    with pytest.raises(RuntimeError, match=r"fxsparse::shuffled_block: expected .*; got x .* and an output "):
        shuffled_block_into(x, packed.values, layer, rest.get("residual"), out)


@pytest.mark.parametrize("what", [what for what in MISFITS if what not in IN_THE_CALL])
def test_what_would_be_read_past_the_end_of_is_not_folded(what: str) -> None:
    """A package may say anything, and the kernel does not look at these again."""
    _, rest, message = MISFITS[what]
    packed, root, graph = pack(torch.ones(20, 6, 3, 3)), nn.Module(), fx.Graph()
    for name, tensor in {**dict(zip(ARRAYS, packed.tensors, strict=True)), "bias": rest.get("bias")}.items():
        root.register_buffer(name, tensor)
    stored = [graph.get_attr(name) for name in ARRAYS]
    bias = graph.get_attr("bias") if "bias" in rest else None
    sizes = ([20, 6, 3, 3], [1, 1], [0, 0], [1, 1], rest.get("activation", "none"), "rows")
    node = graph.call_function(shuffled_block, (graph.placeholder("x"), *stored, bias, None, *sizes))
    with pytest.raises(InputError, match=message):
        FORMATS["shuffled_block"].into(fx.GraphModule(root, graph), node)


@settings(max_examples=30, deadline=None)
@given(
    convolutions(),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.sampled_from(LANES),
)
def test_the_operator_in_cpp_gives_what_the_one_in_python_does(
    case: tuple[Tensor, Tensor, dict[str, tuple[int, int]]],
    activation: str,
    dtype: torch.dtype,
    biased: bool,
    lanes: str,
) -> None:
    w, x, geometry = case
    packed, bias = pack(w.to(dtype), lanes=lanes), torch.randn(len(w)).to(dtype) if biased else None
    x = x.to(dtype)
    plain = multiply(packed, x, bias, activation=activation, **geometry)
    y = multiply(packed, x, bias, plain, activation=activation, **geometry)
    out = torch.full_like(y, torch.nan)
    shuffled_block_into(x, packed.values, _folded(packed, bias, geometry, activation), plain, out)
    assert torch.equal(out, y)


@settings(max_examples=30, deadline=None)
@given(
    convolutions(),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(LANES),
)
def test_a_folded_layer_unfolds_to_what_it_was_made_of(
    case: tuple[Tensor, Tensor, dict[str, tuple[int, int]]],
    activation: str,
    dtype: torch.dtype,
    biased: bool,
    flat: bool,
    lanes: str,
) -> None:
    w, _, geometry = case
    if flat:
        w, geometry = w.flatten(1), {}
    packed, bias = pack(w.to(dtype), lanes=lanes), torch.randn(len(w)).to(dtype) if biased else None
    arrays, same, (shape, *windows, name, unfolded) = unfold(packed.values, _folded(packed, bias, geometry, activation))
    assert all(map(torch.equal, arrays, packed.tensors))
    assert [a.dtype for a in arrays] == [a.dtype for a in packed.tensors]
    assert (same is None) == (bias is None)
    assert bias is None or (same is not None and torch.equal(same, bias))
    defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    assert [tuple(p) for p in windows] == [geometry.get(n, d) for n, d in defaults.items()]
    assert (tuple(shape), name, unfolded) == (packed.shape, activation, lanes)


def test_groups_that_leave_out_a_row_with_a_nonzero_are_refused() -> None:
    w = torch.ones(40, 5)
    w[39] = 0
    assert torch.equal(unpack(pack(w, [np.arange(20), np.arange(20, 39)])), w)
    with pytest.raises(InputError, match="got 19 that are in none, the first is 20"):
        pack(w, [np.arange(20)])


@pytest.mark.parametrize("name", ["shuffled_block", "unstructured"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_format_gives_the_weight_back(dtype: torch.dtype, name: str) -> None:
    form = FORMATS[name]
    for shape in ((40, 12), (33, 5, 3, 3), (1, 1)):
        w = blocks(shape, 16, 0.4, 0).to(dtype)
        assert torch.equal(form.unpack(form.pack(w)), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rows"), [((75, 9, 3, 3), 40), ((130, 33), 64), ((20, 7), 5), ((70, 12), 70)])
def test_groups_are_split_for_narrow_vectors(shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    w = blocks(shape, rows, 0.4, 0).to(dtype)
    w[3], w[-1] = 0, 0
    packed = pack(w)
    parts = split(packed)
    assert int(parts.row_ptr.diff().max()) <= 16
    assert len(parts.values) == len(packed.values)
    assert torch.equal(unpack(parts), w)
    if len(shape) == 2:
        x = torch.randn(21, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        torch.testing.assert_close(multiply(parts, x), multiply(packed, x))


def test_a_weight_of_another_rank_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected \[O, I\] or \[O, I, kH, kW\]; got shape \(2, 3, 4\)"):
        pack(torch.ones(2, 3, 4))


# ------------------------------------------------------------ building the kernel


def test_a_library_cut_short_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    (tmp_path / "tiny.cpp").write_text('extern "C" int seven() { return 7; }')
    builds = []
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: builds.append(Path(path)))  # cutting a loaded file is fatal
    build.load("tiny")
    monkeypatch.undo()
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    builds[0].write_bytes(builds[0].read_bytes()[:100])
    build.load.cache_clear()
    assert build.load("tiny").seven() == 7
    assert [p.name for p in tmp_path.glob("*.so")] == [builds[0].name]
    build.load.cache_clear()


def test_without_a_folder_to_write_to_kernels_are_built_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", "/proc/none")
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    (tmp_path / "small.cpp").write_text('extern "C" int eight() { return 8; }')
    assert build.load("small").eight() == 8
    assert "FXSPARSE_CACHE_DIR" in caplog.text
    build.load.cache_clear()


def test_times_are_remembered_for_the_compiler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    own = build.digest.__wrapped__("n_m")
    assert own == build.digest.__wrapped__("n_m") != build.digest.__wrapped__("shuffled_block")
    monkeypatch.setenv("CXX", f"{build.compiler()} -O1")
    assert build.digest.__wrapped__("n_m") != own


def test_a_source_that_does_not_compile_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    (tmp_path / "broken.cpp").write_text("int main( {")
    with pytest.raises(TargetError, match=r"kernel broken.cpp: expected a C\+\+17 compiler with OpenMP; got "):
        build.load("broken")
    assert [p.name for p in tmp_path.iterdir()] == ["broken.cpp"]


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TargetError, match="got none"):
        build._compiler_or_raise("shuffled_block")


SANITIZED = """
import itertools, torch
from fxsparse.kernels.cpu.shuffled_block import run
from tests.test_shuffled_block import blocks
from fxsparse.formats.shuffled_block import pack
from fxsparse.kernels.shared import LANES
for shape, size, s, p in [((70, 5, 3, 3), (2, 9, 7, 5), 1, 1), ((33, 64, 3, 3), (1, 40, 57, 64), 2, 1),
                          ((20, 8, 1, 1), (3, 11, 13, 8), 1, 0), ((20, 3, 7, 7), (1, 30, 31, 3), 2, 3),
                          ((20, 16, 3, 3), (9, 3, 1, 16), 1, 1), ((80, 64, 1, 1), (3, 17, 21, 64), 2, 0),
                          ((77, 24, 3, 3), (5, 3, 2, 24), 1, 1), ((150, 40, 1, 1), (1, 1, 197, 40), 1, 0)]:
    for dtype, lanes in itertools.product((torch.float32, torch.bfloat16), LANES):
        weight = blocks(shape, 32 if lanes == "rows" else 3, 0.4, 0).to(dtype)
        w, x = pack(weight, lanes=lanes), torch.randn(size).to(dtype)
        oh, ow = ((n + 2 * p - k) // s + 1 for n, k in zip(size[1:3], shape[2:]))
        y = torch.zeros(size[0], oh, ow, shape[0], dtype=dtype)
        geometry = (shape[2:], (s, s), (p, p), (1, 1))
        run(x, y, w.tensors, torch.ones(shape[0], dtype=dtype), y.clone(), geometry, "gelu", lanes)
        if lanes == "rows":
            x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            run(x, y, w.tensors, None, None, geometry, "none", planes=True)
print("clean")
"""


@pytest.mark.slow
def test_the_kernel_is_clean_under_address_and_undefined_behavior_sanitizers(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    if not found.stdout.strip().startswith("/"):
        pytest.skip("this compiler has no AddressSanitizer")
    flags = "g++ -DFXSPARSE_FEW_TILES -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    environment = {**os.environ, "CXX": flags, "LD_PRELOAD": found.stdout.strip(), "FXSPARSE_CACHE_DIR": str(tmp_path),
                   "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(root)}  # fmt: skip
    command = [sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"


def test_shuffled_block_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack(torch.ones(2, 2)).shape = (1, 1)  # type: ignore[misc]
    assert isinstance(pack(torch.ones(2, 2)), ShuffledBlock)
