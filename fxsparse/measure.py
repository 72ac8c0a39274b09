"""Timing: interleaved runs of several builds, medians and spread; single layers for choosing widths.

Builds take turns (A B C, A B C ...), so a machine that slows down slows all of them; the ratio of two builds is the
median over rounds of their ratio within a round.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxsparse.backend.cuda_graph import CudaGraph
from fxsparse.backend.memory import Memory
from fxsparse.backend.onednn import onednn_convolution, onednn_linear
from fxsparse.formats import semi_structured, shuffled_block_gpu
from fxsparse.formats.n_m import NM, unpack
from fxsparse.formats.n_m_op import n_m_into
from fxsparse.formats.shuffled_block import ShuffledBlock
from fxsparse.formats.shuffled_block_few import has_few
from fxsparse.formats.shuffled_block_layer import fold
from fxsparse.formats.shuffled_block_op import as_run, multiply, pair, shuffled_block_into
from fxsparse.formats.turned import turned
from fxsparse.ir.files import replacing
from fxsparse.ir.graph import arg, aten
from fxsparse.ir.symbols import concrete
from fxsparse.kernels.build import digest
from fxsparse.kernels.triton import digest as triton_digest
from fxsparse.machine import device_name, machine_key

log = logging.getLogger("fxsparse")

ROUNDS = (6, 60)  # at least, at most
QUALIFYING_ROUNDS = (1, 3)
QUALIFYING_SECONDS = 3.0
SLOW_MS = 250.0  # a run that long streams more than any cache holds: running it once more first changes nothing
CLOSE = 1.15  # a rival that far behind the fastest rival after the first rounds is not timed further
NEAR_TIE = 1.1  # a ratio of times that is nearer to 1 is measured longer,
AGAIN = (6, 600)  # for so many rounds
IN_A_GRAPH = 20  # runs of a layer on a GPU that are timed at once
CACHES = 64 << 20  # bytes that leave nothing else in a processor's caches
GPU_CACHES, COPIES = 128 << 20, 64  # the same of a GPU; copies of one weight at most
SECONDS = 6.0  # stop after this long once the least number of rounds is done


Build = Callable[[], object]


@dataclass(frozen=True)
class Runs:
    """Milliseconds per build, one entry per round; builds that were dropped early have fewer."""

    ms: Mapping[str, Sequence[float]]

    def median(self, build: str) -> float:
        return statistics.median(self.ms[build])

    def quantile(self, build: str, q: float) -> float:
        return _quantile(self.ms[build], q)

    def fastest(self, builds: Sequence[str]) -> str:
        """The build with the smallest median, among those that were timed to the end."""
        rounds = max(len(self.ms[b]) for b in builds)
        return min((b for b in builds if len(self.ms[b]) == rounds), key=self.median)

    def and_then(self, more: Runs) -> Runs:
        """With the rounds of `more`, for the builds that it timed."""
        return Runs({**self.ms, **{build: [*self.ms[build], *ms] for build, ms in more.ms.items()}})

    def ratios(self, a: str, b: str) -> list[float]:
        """A / b, round by round, sorted."""
        return sorted(x / y for x, y in zip(self.ms[a], self.ms[b], strict=True))


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def play_off(
    ours: Mapping[str, Build],
    rivals: Mapping[str, Build],
    seconds: float = SECONDS,
    bounds: tuple[int, int] = ROUNDS,
) -> Runs:
    """Time `ours` in turns with those `rivals` that have a chance to be the fastest rival.

    Rivals that a few rounds among themselves show to be far behind keep those few.
    """
    first = interleave(rivals, QUALIFYING_SECONDS, QUALIFYING_ROUNDS)
    limit = CLOSE * first.median(first.fastest(list(rivals)))
    last = {name: build for name, build in rivals.items() if first.median(name) <= limit}
    return Runs({**first.ms, **interleave({**ours, **last}, seconds, bounds).ms})


def settled(runs: Runs, a: str, b: str, builds: Mapping[str, Build]) -> Runs:
    """With more rounds of these two where they are close: what else the machine does comes and goes within seconds."""
    ratios = runs.ratios(a, b)
    if not 1 / NEAR_TIE < ratios[len(ratios) // 2] < NEAR_TIE:
        return runs
    return runs.and_then(interleave({name: builds[name] for name in (a, b)}, bounds=AGAIN))


def interleave(builds: Mapping[str, Build], seconds: float = SECONDS, bounds: tuple[int, int] = ROUNDS) -> Runs:
    """Time `builds` in turns. Waits for the GPU where there is one."""
    warm_ms = {name: min(_time_ms(run) for _ in range(2)) for name, run in builds.items()}
    ms: dict[str, list[float]] = {name: [] for name in builds}
    stop = time.perf_counter() + seconds
    for rounds in range(bounds[1]):
        if rounds >= bounds[0] and time.perf_counter() > stop:
            break
        names = list(builds) if rounds % 2 == 0 else list(builds)[::-1]  # no build always follows the same one
        for name in names:
            if warm_ms[name] < SLOW_MS:
                builds[name]()  # its weights are back in the caches, as for whoever calls it again and again
            ms[name].append(_time_ms(builds[name]))
    return Runs(ms)


def _time_ms(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return (time.perf_counter() - start) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class LayerTimes:
    """Seconds of one convolution or linear layer at any widths, remembered on disk.

    The file is keyed by machine, torch version and threads, written whole under a temporary name and then renamed; one
    that cannot be read is started anew. On a CPU the layer runs as Inductor would run it: oneDNN with packed weights;
    on a GPU inside a CUDA graph, channels last.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None,
        batch: int,
        shared: dict[str, dict[str, float]] | None = None,
    ) -> None:
        """`shared`: what others in this process measured, by machine, torch version and threads; it is added to."""
        machine = machine_key()
        self.path = Path(cache_dir) / f"layer-times-{machine}.json" if cache_dir is not None else None
        self.batch = batch
        self.seconds = {} if shared is None else shared.setdefault(machine, {})
        self.seconds.update(self._load())

    def __call__(self, node: fx.Node, rows: int, columns: int) -> float:
        """Seconds for `node` with a weight of `rows` x `columns` (x taps), at the batch given."""
        return self._look_up(_Case.of(node, rows, columns, self.batch).as_read(node))

    def of_format(self, node: fx.Node, packed: object, summed: bool = False, scattered: bool = False) -> float:
        """Seconds for `node` with its weight packed, at the batch given.

        summed     with the sum that follows it, where the format's operator does that too
        scattered  with its rows where they are; else, on a CPU, as if they were in order
        """
        return self._look_up(_packed_case(packed, node, self.batch, summed, scattered).as_read(node))

    def of_turn(self, node: fx.Node, features_first: bool) -> float:
        """Seconds to put the features of `node` [..., I] first, or last again, on a GPU, at the batch given."""
        val, shape = node.meta["val"], concrete(node, self.batch)
        flat = [math.prod(shape[:-1]), shape[-1]][:: 1 if features_first else -1]
        key = ("turned", triton_digest(), *flat, features_first, *_kind(val))

        def make() -> Build:
            x = _filled(flat, val)
            return lambda: turned(x, features_first)

        return self._look_up(_Case.on(val.device, key, make))

    def _look_up(self, case: _Case) -> float:
        key = str(case.key)
        if key not in self.seconds:
            self.seconds[key] = case.measure_s()
        return self.seconds[key]

    def save(self) -> None:
        """Write what was measured, merged with what other processes wrote meanwhile. Only warns where it cannot."""
        if self.path is None:
            return
        try:
            with replacing(self.path) as name:
                name.write_text(json.dumps({**self._load(), **self.seconds}), encoding="utf-8")
        except OSError as error:
            log.warning("layer times are not kept in %s: %s", self.path, error.strerror)

    def _load(self) -> dict[str, float]:
        try:
            found = json.loads(self.path.read_text()) if self.path is not None else {}
        except (OSError, ValueError):
            return {}
        good = isinstance(found, dict) and all(isinstance(v, float) for v in found.values())
        return cast("dict[str, float]", found) if good else {}


@dataclass(frozen=True)
class _Case:
    """What is timed: `make` gives the call, and is only needed when `key` was never timed before."""

    key: tuple[Any, ...]
    make: Callable[[], Build]
    repeats: int = 1  # that one call stands for
    from_memory: bool = False  # whether caches hold something else when a run begins

    @classmethod
    def of_product(cls, key: tuple[Any, ...], make: Callable[[], Build], shape: Sequence[int]) -> _Case:
        """On a CPU, of an input of this shape. With one token all that takes time is reading weights.

        In a network of many layers those come from memory.
        """
        alone = math.prod(shape[:-1]) == 1
        return cls((*key, "from memory") if alone else key, make, from_memory=alone)

    @classmethod
    def on(cls, device: torch.device, key: tuple[Any, ...], make: Callable[[], Build]) -> _Case:
        """On a GPU several runs in a CUDA graph: to launch a kernel takes longer than a small layer runs."""
        if device.type != "cuda":
            return cls(key, make)
        return cls(key, lambda: CudaGraph(functools.partial(_again, make()), (), device), IN_A_GRAPH)

    @classmethod
    def of_few(
        cls,
        device: torch.device,
        key: tuple[Any, ...],
        make: Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]],
        nbytes: int,
    ) -> _Case:
        """On a GPU, of few tokens, which take the time to read the weight: as in a network, it comes from memory.

        make    gives what multiplies by a weight, and the weight
        nbytes  of the weight. Runs take turns with copies, too many for the caches, if it is not below 2 MB.
        """
        copies = min(1 + GPU_CACHES // max(nbytes, 1), COPIES)
        repeats = -(-IN_A_GRAPH // copies) * copies

        def in_turns() -> Build:
            multiply, weight = make()
            weights = [weight, *(weight.clone() for _ in range(copies - 1))]
            return CudaGraph(lambda: _in_turns(multiply, weights, repeats), (), device)

        return cls((*key, "from memory"), in_turns, repeats)

    def as_read(self, node: fx.Node) -> _Case:
        """What reads an input of the model finds the caches full of what the call before left there, on a CPU."""
        x = cast(fx.Node, node.args[0])
        if x.op != "placeholder" or x.meta["val"].is_cuda or self.from_memory:
            return self
        return dataclasses.replace(self, key=(*self.key, "from memory"), from_memory=True)

    def measure_s(self) -> float:
        """The fastest of some runs: one layer is short, and what disturbs it only ever adds."""
        times: list[float] = []
        run = self.make()
        run()
        others = torch.ones(CACHES if self.from_memory else 1, dtype=torch.uint8)
        stop = time.perf_counter() + 0.02
        while len(times) < 5 or (time.perf_counter() < stop and len(times) < 50):
            others.max()
            times.append(_time_ms(run) * 1e-3 / self.repeats)
        return min(times)

    @staticmethod
    def of(node: fx.Node, rows: int, columns: int, batch: int) -> _Case:
        weight = cast(fx.Node, node.args[1]).meta["val"]
        shape = concrete(cast(fx.Node, node.args[0]), batch)
        if node.target is aten.linear.default:
            shape[-1] = columns
            key = ("linear or onednn", tuple(shape), rows, *_kind(weight))

            def make() -> Build:
                return _linear(_filled(shape, weight), _filled([rows, columns], weight))

            def of_weight() -> tuple[Callable[[Tensor], Tensor], Tensor]:
                x = _filled(shape, weight)
                return functools.partial(torch.nn.functional.linear, x), _filled([rows, columns], weight)

            if weight.is_cuda and has_few(node):
                return _Case.of_few(weight.device, key, of_weight, rows * columns * weight.itemsize)
            return _Case.on(weight.device, key, make) if weight.is_cuda else _Case.of_product(key, make, shape)
        return _convolution(node, shape, weight, rows, columns)


@functools.singledispatch
def _packed_case(packed: object, node: fx.Node, batch: int, summed: bool, scattered: bool) -> _Case:
    """What is timed of `node` with a weight packed in one of the formats.

    Memory for the output is asked for in every run, as in a network: of `Memory`, where dense layers ask the system,
    which takes time to hand out new pages.
    """
    raise NotImplementedError(type(packed).__name__)


@_packed_case.register
def _n_m_case(packed: NM, node: fx.Node, batch: int, summed: bool, scattered: bool) -> _Case:
    val = cast(fx.Node, node.args[0]).meta["val"]
    shape = [*concrete(cast(fx.Node, node.args[0]), batch)[:-1], packed.shape[1]]
    key = ("n_m", digest("n_m"), tuple(shape), packed.shape, packed.n, packed.m, *_kind(val))
    if val.is_cuda:
        return _Case.on(val.device, key, lambda: semi_structured.run(_filled(shape, val), unpack(packed)))

    def make() -> Build:
        x, out = _filled(shape, val), _filled([*shape[:-1], packed.shape[0]], val)
        arguments = (x, packed.values, packed.codes, None, *packed.shape, packed.n, packed.m)
        kept = Memory()
        return lambda: n_m_into(*arguments, kept.empty_like(out))

    return _Case.of_product(key, make, shape)


@_packed_case.register
def _shuffled_block_case(packed: ShuffledBlock, node: fx.Node, batch: int, summed: bool, scattered: bool) -> _Case:
    val = cast(fx.Node, node.args[0]).meta["val"]
    shape = concrete(cast(fx.Node, node.args[0]), batch)
    geometry: dict[str, Any] = {}
    if node.target is aten.conv2d.default:
        geometry = {n: pair(arg(node, n)) for n in ("stride", "padding", "dilation")}
        shape = [shape[i] for i in (0, 2, 3, 1)]
    shape[-1] = packed.shape[1]  # before the cut a layer is timed with the columns that will be left
    packed = packed if val.is_cuda else as_run(packed)
    if not val.is_cuda and not (scattered and packed.lanes == "rows"):  # with pixels in lanes their order costs nothing
        in_order = torch.arange(len(packed.rows), dtype=torch.int32, device="cpu")
        packed = dataclasses.replace(packed, rows=in_order)
    indices = b"".join(t.numpy().tobytes() for t in (packed.row_ptr, packed.columns, packed.rows))
    blocks = hashlib.sha256(indices + packed.lanes.encode()).hexdigest()[:16]
    source = triton_digest() if val.is_cuda else digest("shuffled_block")
    key = ("shuffled_block", source, tuple(shape), packed.shape, str(geometry), summed, blocks, *_kind(val))
    if val.is_cuda and len(packed.shape) == 2 and has_few(node):
        few = functools.partial(shuffled_block_gpu.of_few, packed)
        return _Case.of_few(val.device, key, lambda: few(_filled(shape, val)), packed.values.nbytes)
    if val.is_cuda:
        return _Case.on(val.device, key, lambda: shuffled_block_gpu.run(packed, _filled(shape, val), geometry))

    def make() -> Build:
        x = _filled(shape, val)
        windows = [list(geometry.get(n, p)) for n, p in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))]
        out = multiply(packed, x, **geometry)
        residual = _filled(out.shape, val) if summed else None
        layer = fold(packed.tensors, None, packed.shape, windows, "none", packed.lanes)
        kept = Memory()
        return lambda: shuffled_block_into(x, packed.values, layer, residual, kept.empty_like(out))

    return _Case.of_product(key, make, shape)


def _kind(x: Tensor) -> tuple[str, ...]:
    """What a time depends on beside shapes."""
    kind = (str(x.dtype), device_name(x.device))
    if not x.is_cuda or x.dtype != torch.float32:
        return kind
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    return *kind, *(str(switch.fp32_precision) for switch in switches)  # tf32 or not: eight times as fast


def _filled(shape: Sequence[int], like: Tensor) -> Tensor:
    """Ones, and noise on a GPU: the fewer bits change, the faster it runs."""
    make = torch.randn if like.is_cuda else torch.ones
    return make(list(shape), dtype=like.dtype, device=like.device)


def _again(run: Build) -> Sequence[Any]:
    for _ in range(IN_A_GRAPH):
        run()
    return ()


def _in_turns(multiply: Callable[[Tensor], Tensor], weights: Sequence[Tensor], repeats: int) -> Sequence[Any]:
    for i in range(repeats):
        multiply(weights[i % len(weights)])
    return ()


def _linear(x: Tensor, w: Tensor) -> Callable[[], object]:
    """The faster of PyTorch's own product and oneDNN's with packed weights: Inductor may call either."""
    calls = (lambda: torch.nn.functional.linear(x, w), onednn_linear(x, w))
    return min((call for call in calls if call is not None), key=lambda call: min(_time_ms(call) for _ in range(4)))


def _convolution(node: fx.Node, shape: list[int], weight: Tensor, rows: int, columns: int) -> _Case:
    groups = cast(int, arg(node, "groups"))
    channel = len(shape) - weight.dim() + 1
    if groups > 1:
        groups = max(1, rows * groups // weight.shape[0])
    shape[channel] = columns * groups
    taps = list(weight.shape[2:])
    settings = [arg(node, name) for name in ("stride", "padding", "dilation")]
    key = ("conv", tuple(shape), rows, tuple(taps), str(settings), groups, *_kind(weight))

    def make() -> Build:
        x, w = _filled(shape, weight), _filled([rows, columns, *taps], weight)
        if w.is_cuda and w.dim() == 4:  # as Inductor lays images out there
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return onednn_convolution(x, w, settings, groups) or _eager(node, x, w, settings, groups)

    return _Case.on(weight.device, key, make)


def _eager(node: fx.Node, x: Tensor, w: Tensor, settings: list[Any], groups: int) -> Callable[[], object]:
    call = cast(Callable[..., object], node.target)
    return lambda: call(x, w, None, *settings, groups)
