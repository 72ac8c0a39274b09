"""Which library multiplies what Inductor lowers."""

import contextlib
import itertools
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fxsparse
from fxsparse.backend import find_target, onednn
from fxsparse.ir.capture import capture

MKL, ONEDNN = "_mkl_linear", "_linear_pointwise"
SMALL, BETWEEN, LARGE = (32, 16), (16, 64), (64, 48)  # columns and outputs of three layers
pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL to choose from")


def called(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The products of `model` on Inductor in their order; its results are compared with eager's."""
    gm = capture(model.eval(), (x,), fxsparse.Masks(), dynamic_batch=False)
    run, code = run_and_get_code(lambda: find_target("inductor").lower(gm, [x]))
    torch.testing.assert_close(run(x)[0], model(x), rtol=1e-5, atol=1e-5)
    return re.findall(rf"= torch\.ops\.\w+\.({MKL}|{ONEDNN})\.", code[0])


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(*SMALL), nn.ReLU(), nn.Linear(*BETWEEN), nn.ReLU(), nn.Linear(*LARGE))


@pytest.mark.parametrize("faster", [[], [SMALL], [LARGE], [SMALL, LARGE, BETWEEN]])
def test_every_product_goes_to_the_library_that_is_faster_for_it(
    faster: Sequence[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def faster_than_mkl(rows: int, columns: int, outputs: int, threads: int) -> bool:
        asked.append((rows, threads))
        return (columns, outputs) in faster

    monkeypatch.setattr(onednn, "faster_than_mkl", faster_than_mkl)
    found = called(layers(), torch.randn(5, SMALL[0]))
    assert found == [ONEDNN if layer in faster else MKL for layer in (SMALL, BETWEEN, LARGE)]
    assert set(asked) == {(5, torch.get_num_threads())}


def test_inductor_is_left_as_it_was() -> None:
    from torch._inductor.fx_passes import mkldnn_fusion

    before = mkldnn_fusion._get_mkldnn_device_op
    with contextlib.suppress(ZeroDivisionError), onednn.faster_products():
        assert mkldnn_fusion._get_mkldnn_device_op is not before
        raise ZeroDivisionError
    assert mkldnn_fusion._get_mkldnn_device_op is before


@pytest.mark.parametrize(("ours", "mkl", "faster"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, False)])
def test_the_clock_decides(ours: float, mkl: float, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_once = itertools.chain([9.0, 9.0], itertools.cycle([ours, mkl]))  # what disturbs a round only ever adds
    monkeypatch.setattr(onednn, "_seconds", lambda call: call() is None or next(slow_once))
    assert onednn.faster_than_mkl.__wrapped__(3, 16, 8, 1) is faster


def test_the_caller_s_default_dtype_and_device_are_not_what_is_timed() -> None:
    timed: list[Tensor] = []
    pack = onednn.onednn_linear
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
            patch.setattr(onednn, "onednn_linear", lambda *xs: timed.extend(xs) or pack(*xs))
            onednn.faster_than_mkl.__wrapped__(3, 16, 8, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(x.dtype, x.device.type) for x in timed} == {(torch.float32, "cpu")}
