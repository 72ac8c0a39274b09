"""Dense layers on oneDNN, as Inductor calls it, and instead of MKL where that is slower.

Inductor gives oneDNN convolutions and everything in bfloat16, but float32 products of known sizes to MKL. On
processors that are not Intel's MKL uses half of their registers: an EPYC with AVX-512 then takes twice as long, as rows
in docs/benchmarks.md show. So both are timed, once for each size.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.formats.shuffled_block_op import pair

ROUNDS = 4
MOST_ROWS, MOST_OUTPUTS = 1024, 4096  # that are timed: no more is needed to see which library is faster


@contextlib.contextmanager
def faster_products() -> Iterator[None]:
    """What Inductor lowers meanwhile multiplies in the faster library, layer by layer."""
    from torch._inductor.fx_passes import mkldnn_fusion

    fusion: Any = mkldnn_fusion
    own = getattr(fusion, "_get_mkldnn_device_op", None)
    if own is None:  # a torch without oneDNN
        yield
        return
    fusion._get_mkldnn_device_op = lambda device: _Faster(own(device)) if device == "cpu" else own(device)
    try:
        yield
    finally:
        fusion._get_mkldnn_device_op = own


class _Faster:
    """How Inductor packs layers for a CPU. It takes oneDNN for products that are `reduced`: not in float32, that is."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def pack_linear_weight(self, graph: fx.Graph, reduced: bool, weight: fx.Node, rows: Any) -> fx.Node:
        return cast(fx.Node, self._own.pack_linear_weight(graph, reduced or _wins(weight, rows), weight, rows))

    def pack_linear(self, graph: fx.Graph, reduced: bool, rows: Any, x: fx.Node, packed: Any, *bias: Any) -> fx.Node:
        reduced = reduced or _wins(packed.args[0], rows)
        return cast(fx.Node, self._own.pack_linear(graph, reduced, rows, x, packed, *bias))


def _wins(transposed: fx.Node, rows: Any) -> bool:
    """Whether oneDNN is faster with this weight, for so many rows; symbolic numbers of them are oneDNN's anyway."""
    columns, outputs = cast(fx.Node, transposed.args[0]).meta["val"].shape
    if not isinstance(rows, int):
        return False
    return faster_than_mkl(min(rows, MOST_ROWS), columns, min(outputs, MOST_OUTPUTS), torch.get_num_threads())


@functools.cache
def faster_than_mkl(rows: int, columns: int, outputs: int, threads: int) -> bool:
    """Whether oneDNN multiplies float32 [rows, columns] with [columns, outputs] faster than MKL, both timed here."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.no_grad():
        x, w = (torch.ones(n, columns, dtype=torch.float32, device="cpu") for n in (rows, outputs))
        onednn = onednn_linear(x, w)
        if onednn is None:
            return False
        calls = (onednn, lambda: torch.nn.functional.linear(x, w))
        for call in calls:
            call()
        seconds = [[_seconds(call) for call in calls] for _ in range(ROUNDS)]
    ours, mkl = map(min, zip(*seconds, strict=True))
    return bool(ours < mkl)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _packs(x: Tensor) -> bool:
    """Whether oneDNN packs weights for inputs like `x` on this processor: in bfloat16 not every one has the vectors."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 or bool(supported)


def onednn_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Callable[[], object] | None:
    """OneDNN with packed weights, as Inductor calls it; None where oneDNN has no such kernel."""
    if not _packs(x) or not x.numel():
        return None
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(w, x.numel() // x.shape[-1])
    call = torch.ops.mkldnn._linear_pointwise.default
    return lambda: call(x, packed, bias, "none", [], "")


def onednn_convolution(x: Tensor, w: Tensor, settings: list[Any], groups: int) -> Callable[[], object] | None:
    """OneDNN with packed weights in channels_last, as Inductor calls it; None where oneDNN has no such kernel.

    settings  stride, padding, dilation
    """
    if not _packs(x) or x.dim() != 4 or isinstance(settings[1], str):
        return None
    stride, padding, dilation = map(pair, settings)
    x = x.to(memory_format=torch.channels_last)
    reorder = cast(Any, torch._C._nn).mkldnn_reorder_conv2d_weight
    with torch.no_grad():
        packed = reorder(w.to_mkldnn(), padding, stride, dilation, groups, list(x.shape))
    call = torch.ops.mkldnn._convolution_pointwise.default
    return lambda: call(x, packed, None, padding, stride, dilation, groups, "none", [], "")
