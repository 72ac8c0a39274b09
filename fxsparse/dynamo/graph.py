"""One graph of dynamo's at run time: built for the weights that come in, and again when they have changed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.arguments import checked_inputs
from fxsparse.backend.target import COMPILING
from fxsparse.compiler import Captured, Options, build
from fxsparse.dynamo.seen import Seen
from fxsparse.dynamo.settings import Settings
from fxsparse.dynamo.strides import apart, laid_out, order_of
from fxsparse.errors import CaptureError
from fxsparse.ir.inputs import Call
from fxsparse.ir.masks import Masks
from fxsparse.ir.retrace import Retraced, outputs_of
from fxsparse.module import Build, run_build
from fxsparse.report import Report

log = logging.getLogger("fxsparse")

Function = Callable[..., Sequence[Any]]


def graph_name() -> str:
    """`graph 0/1`: frame and compilation, as in torch's own logs."""
    from torch._guards import CompileContext

    return f"graph {CompileContext.current_compile_id()}"


@dataclasses.dataclass
class _Entry:
    """The graph built for the weights of one module, as they were."""

    weights: Callable[[Sequence[Any]], Sequence[Tensor]]
    seen: Seen
    inputs: list[int]
    build: Build
    shapes: list[torch.Size]


class Graph:
    """One graph of dynamo's, built at its first call, and again for other weights.

    Dynamo shares a graph between modules of one class, and so does this: it has one build for each of them.
    """

    def __init__(self, gm: fx.GraphModule, retraced: Retraced, weights: Mapping[int, str], settings: Settings) -> None:
        self.gm, self.retraced, self.settings = gm, retraced, settings
        self.name = graph_name()
        self.weights = {i: name for i, name in weights.items() if i not in retraced.written}
        self.running = retraced.running
        self.entry: _Entry | None = None
        self.entries: list[_Entry] = []
        self.orders = [order_of(n.meta.get("example_value")) for n in outputs_of(gm)]

    def run(self, *args: Any) -> Sequence[Any]:
        """Dynamo's inputs to dynamo's outputs, in eager's strides; written inputs are written."""
        entry = self.entry
        if entry is None or not entry.seen.unchanged(entry.weights(args)):
            entry = self._find(args)
        inputs = [args[i] for i in entry.inputs]
        same = all(x.shape == shape for x, shape in zip(inputs, entry.shapes, strict=True))
        values = run_build(entry.build, inputs, same)
        written, views = self.retraced.written, self.retraced.views
        with torch.no_grad():
            for i, value in zip(written, values, strict=False):
                args[i].copy_(value)
            outputs = list(apart(map(laid_out, values[len(written) :], self.orders)))
            for i, view in views.items():
                outputs[i] = view.of(args[view.index])
            return outputs

    def _find(self, args: Sequence[Any]) -> _Entry:
        with COMPILING:
            weights = [args[i] for i in self.weights]
            entry = next((e for e in self.entries if e.seen.are(weights)), None)
            changed = entry.seen.changed(weights) if entry is not None else []
            if entry is None or changed:
                alive = [e for e in self.entries if e is not entry and e.seen.alive()]
                if changed and self._drop_state([list(self.weights)[i] for i in changed], args):
                    alive = []  # built with other inputs
                entry = self._build(args)
                self.entries = [*alive, entry]
            self.entry = entry
            return entry

    def _drop_state(self, changed: Sequence[int], args: Sequence[Any]) -> bool:
        """Buffers that change by themselves are state, not weights: from now on they are inputs."""
        names = ", ".join(self.weights[i] for i in changed[:3]) + (" ..." if len(changed) > 3 else "")
        log.warning("%s is built again: %s changed", self.name, names)
        if any(isinstance(args[i], nn.Parameter) or i in self.running for i in changed):
            return False
        self.weights = {i: name for i, name in self.weights.items() if i not in changed}
        return True

    def _build(self, args: Sequence[Any]) -> _Entry:
        seen = Seen([args[i] for i in self.weights], [k for k, i in enumerate(self.weights) if i in self.running])
        dynamic = any(grows and i not in self.weights for i, grows in enumerate(self.retraced.dynamic))
        inputs = [i for i, x in enumerate(args) if isinstance(x, Tensor) and i not in self.weights]
        leaves = list(checked_inputs(Call(tuple(args[i] for i in inputs), {})).args)
        log.info("%s", self.name)
        options = dataclasses.replace(self.settings.options, dynamic_batch=dynamic)
        built = self._built(args, inputs, leaves, options)
        return _Entry(_taker(self.weights), seen, inputs, built, [args[i].shape for i in inputs])

    def _built(self, args: Sequence[Any], inputs: Sequence[int], leaves: list[Tensor], options: Options) -> Build:
        in_spec = pytree.tree_structure((tuple(leaves), {}))
        out_spec = pytree.tree_structure([None] * (len(self.retraced.written) + len(self.orders)))
        with torch.inference_mode(False), torch.no_grad():
            names = {i: self.settings.names().get(id(args[i]), name) for i, name in self.weights.items()}
            values, masks = self._values(args, names)
            own = functools.partial(self._own, {**dict(enumerate(args)), **values}, inputs)
            gm = self.retraced.bind(named := {i: (names[i], w) for i, w in values.items()})
            parameters = sum(args[i].numel() for i in values if isinstance(args[i], nn.Parameter))
            captured = Captured(gm, leaves, own, masks, parameters)
        with _dynamo_lock():
            try:
                built = build(captured, in_spec, out_spec, options)
            except CaptureError as error:  # a shape that the analysis cannot follow
                log.warning("%s stays dense: %s", self.name, error)
                gm = self.retraced.bind(named)
                run = options.target.lower(gm, leaves)
                return Build(
                    gm, leaves, in_spec, out_spec, options.target, run, cast(Report, None), options.dynamic_batch
                )
        log.info("%s: %s", self.name, built.report.verdict)
        self.settings.on_report(built.report)
        return built

    def _values(self, args: Sequence[Any], names: Mapping[int, str]) -> tuple[dict[int, Tensor], Masks]:
        """Masked copies of the weights, and the masks by name."""
        found = dict(zip(self.weights, self.settings.masks_of([args[i] for i in self.weights]), strict=True))
        masks = {i: m.to(args[i].device) for i, m in found.items() if m is not None}
        values = {i: args[i].detach() for i in self.weights}
        values = {i: w.masked_fill(~masks[i], 0) if i in masks else w.clone() for i, w in values.items()}
        shown = masks or {i: w != 0 for i, w in values.items() if w.dim() > 1 and bool((w == 0).any())}
        return values, Masks({names[i]: m for i, m in shown.items()})

    def _own(self, full: dict[int, Any], inputs: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
        """What dynamo's own graph gives, written inputs first."""
        full = {**full, **{i: x.clone() for i, x in zip(inputs, leaves, strict=True)}}
        with torch.no_grad():
            outputs = self.gm(*[full[i] for i in range(len(full))])
        return [*(full[i] for i in self.retraced.written), *outputs]


def _taker(indices: Iterable[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What picks these of a call's arguments, as fast as Python can."""
    several = tuple(indices)
    return operator.itemgetter(*several) if len(several) > 1 else lambda args: [args[i] for i in several]


def _dynamo_lock() -> Any:
    """Dynamo compiles one frame at a time: Inductor's settings, which a build changes, belong to the process."""
    from torch._dynamo import convert_frame

    return getattr(convert_frame, "compile_lock", contextlib.nullcontext())


class Masked:
    """A dense graph whose parameters are masked before each call: one graph may serve several modules."""

    def __init__(self, function: Function, indices: Sequence[int], settings: Settings) -> None:
        self.function, self.indices, self.settings = function, indices, settings
        self.found: tuple[Seen, list[Tensor | None]] | None = None

    def run(self, *args: Any) -> Sequence[Any]:
        weights, inputs = [args[i] for i in self.indices], list(args)
        found = self.found
        if found is None or not found[0].are(weights):
            found = self.found = (Seen(weights), self.settings.masks_of(weights))
        for i, mask in zip(self.indices, found[1], strict=True):
            if mask is not None:
                inputs[i] = torch.where(mask.to(args[i].device), args[i], 0)
        return self.function(*inputs)
