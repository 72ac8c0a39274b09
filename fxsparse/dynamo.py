"""`torch.compile(model, backend="fxsparse", options={"masks": masks})`: the compiler as a back end of TorchDynamo.

Dynamo hands over one graph at a time, weights among its inputs. The graph is traced again into the compiler's dialect
(`ir.retrace`), its weights become constants, and from there `compiler.build` does what it does for `compile`: the same
passes, contest and verification. Weights are told by identity, and looked at before every call: one that has changed
since (an optimizer step, load_state_dict) is never computed with, the graph is built again. A graph this compiler is not
for stays dense, on Inductor, and the logger "fxsparse" says why.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.arguments import checked_inputs
from fxsparse.compiler import Captured, Options, as_masks, build, checked_options
from fxsparse.errors import CaptureError, FxSparseError, InputError, near
from fxsparse.ir.masks import Masks
from fxsparse.ir.retrace import Retraced, Training, Unfit, outputs_of, retrace
from fxsparse.module import COMPILING, Build, run_build
from fxsparse.report import Report

log = logging.getLogger("fxsparse")

DEFAULTS: dict[str, Any] = {
    "target": "inductor", "formats": "auto", "verify": "end", "measure": True, "cache_dir": None,
}  # fmt: skip
KNOWN = ("masks", "model", "on_report", *DEFAULTS)
Function = Callable[..., Sequence[Any]]


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    name: str | None = None,
) -> Function:
    """What torch.compile calls for every graph; users name it, "fxsparse".

    options  masks, target, formats, verify, measure, cache_dir  as for `fxsparse.compile`
             model      whose names the masks use; by default the module that torch.compile was called on
             on_report  called with the Report of every graph that was built
    Raises nothing here, since dynamo would run the model eagerly and unmasked after some errors: the compiled model
    raises InputError, MaskError or TargetError when it is called.
    """
    try:
        settings = _settings({} if options is None else options, mode)
        weights = _weights(gm, example_inputs, settings)
        settings.masks_of([x for x in example_inputs if isinstance(x, nn.Parameter)])
    except FxSparseError as error:
        return functools.partial(_raise, error)
    try:
        _refuse(example_inputs, weights)
        retraced = retrace(gm)
        if any(view.index in weights for view in retraced.views.values()):
            raise Unfit("one of its outputs is a view of a weight")
        return _Graph(gm, retraced, weights, settings).run
    except Unfit as reason:
        _tell(reason)
        return _dense(gm, example_inputs, settings)


def _raise(error: FxSparseError, *args: Any) -> NoReturn:
    raise error.with_traceback(None) from None


# options and masks


class _Given(Masks):
    """Masks of one call of torch.compile, equal to themselves alone: torch compares options whenever code is looked up."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The checked options of one call of torch.compile."""

    options: Options
    masks: _Given | None
    model: nn.Module | None
    on_report: Callable[[Report], object]

    def root(self) -> nn.Module | None:
        """The module whose names count."""
        return self.model if self.model is not None else compiled_module()

    def masks_of(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """For each weight of a graph its mask.

        Raises MaskError, and InputError when no model says which name is which tensor, or masks are out of reach.
        """
        if self.masks is None:
            return [None] * len(weights)
        root = self.root()
        if root is None:
            raise InputError("options['masks']", expected="a module as what torch.compile was called on", got="a function",
                             do="Say whose names they are: options={'masks': masks, 'model': model}.")  # fmt: skip
        parameters = dict(root.named_parameters())
        masks = self.masks.check(root)
        of = {id(parameters[name]): mask for name, mask in masks.items()}
        found = [of.get(id(w)) for w in weights]
        if any(isinstance(w, nn.Parameter) for w in weights):
            here = {id(w) for w in weights}
            self._refuse_unmasked({n: parameters[n] for n in masks if id(parameters[n]) not in here}, masks)
        return found

    def _refuse_unmasked(self, elsewhere: Mapping[str, Tensor], masks: Masks) -> None:
        """What dynamo leaves to Python reads the model's own weights: there, a mask has to be in them already."""
        for name, weight in elsewhere.items():
            if bool(((weight.detach() != 0) & ~masks[name].to(weight.device)).any()):
                raise InputError(
                    f"options['masks'], {name!r}",
                    expected="a weight that is zero where it is masked, as it is not in this graph: torch.compile "
                             "splits the model or runs it partly as Python, which no mask reaches",
                    got="other values there",
                    do="Masks(masks).apply_(model) zeroes them; or compile with fullgraph=True, from the model's root.",
                )  # fmt: skip


def _settings(options: dict[str, Any], mode: str | None) -> _Settings:
    if mode is not None:
        raise InputError(f"mode={mode!r} of torch.compile", expected="none with backend='fxsparse'", got=repr(mode),
                         do=f"Pass options instead: {', '.join(KNOWN)}.")  # fmt: skip
    for key in options:
        if key not in KNOWN:
            raise InputError(f"options[{key!r}] of torch.compile", expected=f"one of {', '.join(KNOWN)}",
                             got="an unknown name", do=near(str(key), KNOWN) or "Leave it out.")  # fmt: skip
    if options.get("masks") is not None and not isinstance(options["masks"], _Given):
        # In place, since torch keeps this dict and compares it: two dicts of tensors would raise there.
        options["masks"] = _Given(as_masks(options["masks"]))
    model, on_report = options.get("model"), options.get("on_report", lambda report: None)
    if model is not None and not isinstance(model, nn.Module):
        raise InputError("options['model']", expected="a torch.nn.Module", got=type(model).__name__,
                         do="It is the module whose parameter names the masks use.")  # fmt: skip
    if not callable(on_report):
        raise InputError("options['on_report']", expected="a function of one Report", got=type(on_report).__name__,
                         do="To collect them: reports = []; options={'on_report': reports.append}.")  # fmt: skip
    values = {**DEFAULTS, **{key: options[key] for key in DEFAULTS if key in options}}
    return _Settings(checked_options(dynamic_batch=False, **values), options.get("masks"), model, on_report)


def compiled_module() -> nn.Module | None:
    """The module that the running code was compiled for by torch.compile; None for a function.

    A back end is not told. Names in dynamo's sources are those of the frame, which after a graph break is the frame of
    some inner module; the wrapper that torch.compile made is on the stack, and knows its module.
    """
    from torch._dynamo import eval_frame

    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == eval_frame.__file__ and "fn" in frame.f_locals:
            first = next(iter(frame.f_locals.get("args", ())), None)  # self, of a decorated forward
            owner = getattr(frame.f_locals["fn"], "__self__", first)
            if isinstance(owner, nn.Module):
                return owner
            if frame.f_code.co_name == "compile_wrapper":  # else torch._dynamo.disable, around this back end
                return None
        frame = cast(Any, frame.f_back)
    return None


# which inputs are weights


def _weights(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: _Settings) -> dict[int, str]:
    """Index -> name of the inputs that are parameters or buffers: of the model, by identity, or of another module."""
    root, names = settings.root(), cast("dict[int, str]", {})
    for kind in (root.named_buffers, root.named_parameters) if root is not None else ():
        names |= {id(tensor): name for name, tensor in kind()}
    found = {}
    for i, (node, tensor) in enumerate(zip(_placeholders(gm), example_inputs, strict=True)):
        source = _source(node)
        if isinstance(tensor, Tensor) and (id(tensor) in names or "._parameters[" in source or "._buffers[" in source):
            found[i] = names.get(id(tensor), _dotted(source))
    return found


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _source(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method until torch 2.11


def _dotted(source: str) -> str:
    """`conv.weight` for L['self']._modules['conv']._parameters['weight']."""
    parts = re.findall(r"\['([^']*)'\]|\[(\d+)\]", source.replace("L['self']", "", 1))
    return ".".join(a or b for a, b in parts) or "weight"


def _refuse(example_inputs: Sequence[Any], weights: Mapping[int, str]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise Training("gradients are asked for")
    if not weights:
        raise Unfit("it has no weights")
    if any(example_inputs[i].is_inference() for i in weights):
        raise Unfit("its weights were made under torch.inference_mode(), where changes to them cannot be seen")


# dense graphs


def _tell(reason: Unfit) -> None:
    if isinstance(reason, Training):
        warnings.warn(
            "fxsparse compiles for inference: what is called with gradients or in training mode stays dense, on "
            "Inductor. For inference call model.eval(), and the compiled model under torch.no_grad().",
            UserWarning,
            stacklevel=2,
        )
    log.log(logging.INFO if "no weights" in str(reason) else logging.WARNING, "%s stays dense: %s", _graph_name(), reason)


def _graph_name() -> str:
    from torch._guards import CompileContext

    return f"graph {CompileContext.current_compile_id()}"


def _dense(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: _Settings) -> Function:
    """The graph as it is on Inductor (or in eager, with that target); masks are applied to its inputs at every call."""
    from torch._dynamo.backends.registry import lookup_backend

    name = "eager" if settings.options.target.name == "eager" else "inductor"
    run = cast(Function, lookup_backend(name)(gm, list(example_inputs)))
    masked = [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)]
    return _Masked(run, masked, settings).run if settings.masks is not None else run


class _Masked:
    """A dense graph whose parameters are masked before each call: one graph may serve several modules."""

    def __init__(self, function: Function, indices: Sequence[int], settings: _Settings) -> None:
        self.function, self.indices, self.settings = function, indices, settings
        self.found: tuple[_Seen, list[Tensor | None]] | None = None

    def run(self, *args: Any) -> Sequence[Any]:
        weights, inputs = [args[i] for i in self.indices], list(args)
        found = self.found
        if found is None or not found[0].are(weights):
            found = self.found = (_Seen(weights), self.settings.masks_of(weights))
        for i, mask in zip(self.indices, found[1], strict=True):
            if mask is not None:
                inputs[i] = torch.where(mask.to(args[i].device), args[i], 0)
        return self.function(*inputs)


# sparse graphs


class _Seen:
    """Tensors as they were at one time. A weak reference tells that an id was not taken by a new tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [(weakref.ref(t), t._version, t.data_ptr()) for t in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """The same objects."""
        return all(ref() is t for (ref, _, _), t in zip(self.tensors, tensors, strict=True))

    def alive(self) -> bool:
        return all(ref() is not None for ref, _, _ in self.tensors)

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of those that were replaced, written to or given other storage since."""
        return [
            i
            for i, ((ref, version, pointer), t) in enumerate(zip(self.tensors, tensors, strict=True))
            if t._version != version or ref() is not t or t.data_ptr() != pointer
        ]


@dataclasses.dataclass
class _Entry:
    """The graph built for the weights of one module, as they were."""

    seen: _Seen
    inputs: list[int]
    build: Build
    shapes: list[torch.Size]


class _Graph:
    """One graph of dynamo's, built at its first call, and again for other weights.

    Dynamo shares a graph between modules of one class, and so does this: it has one build for each of them.
    """

    def __init__(self, gm: fx.GraphModule, retraced: Retraced, weights: Mapping[int, str], settings: _Settings) -> None:
        self.gm, self.retraced, self.settings = gm, retraced, settings
        self.name = _graph_name()
        self.weights = {i: name for i, name in weights.items() if i not in retraced.written}
        self.entry: _Entry | None = None
        self.entries: list[_Entry] = []
        self.orders = [_order(n.meta.get("example_value") if isinstance(n, fx.Node) else None) for n in outputs_of(gm)]

    def run(self, *args: Any) -> Sequence[Any]:
        """Dynamo's inputs to dynamo's outputs, in eager's strides; written inputs are written."""
        entry = self.entry
        if entry is None or entry.seen.changed([args[i] for i in self.weights]):
            entry = self._find(args)
        inputs = [args[i] for i in entry.inputs]
        same = all(x.shape == shape for x, shape in zip(inputs, entry.shapes, strict=True))
        values = run_build(entry.build, inputs, same)
        written, views = self.retraced.written, self.retraced.views
        with torch.no_grad():
            for i, value in zip(written, values, strict=False):
                args[i].copy_(value)
            outputs = list(_apart(map(_laid_out, values[len(written) :], self.orders)))
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
        if any(isinstance(args[i], nn.Parameter) for i in changed):
            return False
        self.weights = {i: name for i, name in self.weights.items() if i not in changed}
        return True

    def _build(self, args: Sequence[Any]) -> _Entry:
        seen = _Seen([args[i] for i in self.weights])
        dynamic = [bool(grows) and i not in self.weights for i, grows in enumerate(self.retraced.dynamic)]
        inputs = [i for i, x in enumerate(args) if isinstance(x, Tensor) and i not in self.weights]
        leaves = list(checked_inputs(tuple(args[i] for i in inputs)))
        log.info("%s", self.name)
        options = dataclasses.replace(self.settings.options, dynamic_batch=any(dynamic))
        built = self._built(args, inputs, leaves, [dynamic[i] for i in inputs], options)
        return _Entry(seen, inputs, built, [args[i].shape for i in inputs])

    def _built(
        self, args: Sequence[Any], inputs: Sequence[int], leaves: list[Tensor], grows: list[bool], options: Options
    ) -> Build:
        in_spec = pytree.tree_structure(tuple(leaves))
        out_spec = pytree.tree_structure([None] * (len(self.retraced.written) + len(self.orders)))
        with torch.inference_mode(False), torch.no_grad():
            values, masks = self._values(args)
            own = functools.partial(self._own, {**dict(enumerate(args)), **values}, inputs)
            gm = self._bind(values)
            parameters = sum(args[i].numel() for i in values if isinstance(args[i], nn.Parameter))
            captured = Captured(gm, leaves, own, masks, parameters, grows)
        with _dynamo_lock():
            try:
                built = build(captured, in_spec, out_spec, options)
            except CaptureError as error:  # a shape that the analysis cannot follow
                log.warning("%s stays dense: %s", self.name, error)
                gm = self._bind(values)
                run = options.target.lower(gm, leaves)
                return Build(gm, leaves, in_spec, out_spec, options.target, run, cast(Report, None), any(grows))
        log.info("%s: %s", self.name, built.report.verdict)
        self.settings.on_report(built.report)
        return built

    def _values(self, args: Sequence[Any]) -> tuple[dict[int, Tensor], Masks]:
        """Masked copies of the weights, and the masks by name."""
        found = dict(zip(self.weights, self.settings.masks_of([args[i] for i in self.weights]), strict=True))
        masks = {i: m.to(args[i].device) for i, m in found.items() if m is not None}
        values = {i: args[i].detach() for i in self.weights}
        values = {i: w.masked_fill(~masks[i], 0) if i in masks else w.clone() for i, w in values.items()}
        shown = masks or {i: w != 0 for i, w in values.items() if w.dim() > 1 and bool((w == 0).any())}
        return values, Masks({self.weights[i]: m for i, m in shown.items()})

    def _bind(self, values: Mapping[int, Tensor]) -> fx.GraphModule:
        return self.retraced.bind({i: (self.weights[i], w) for i, w in values.items()})

    def _own(self, full: dict[int, Any], inputs: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
        """What dynamo's own graph gives, written inputs first."""
        full = {**full, **{i: x.clone() for i, x in zip(inputs, leaves, strict=True)}}
        with torch.no_grad():
            outputs = self.gm(*[full[i] for i in range(len(full))])
        return [*(full[i] for i in self.retraced.written), *outputs]


def _dynamo_lock() -> Any:
    """Dynamo compiles one frame at a time: Inductor's settings, which a build changes, belong to the process."""
    from torch._dynamo import convert_frame

    return convert_frame.compile_lock


# outputs


def _order(value: Any) -> list[int] | None:
    """Dimensions from the largest stride to the smallest; None where there is none to keep."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    strides = [s if isinstance(s, int) else s.node.hint for s in value.stride()]  # read without a guard
    return None if 0 in strides else sorted(range(len(strides)), key=lambda d: -strides[d])


def _laid_out(y: Any, order: list[int] | None) -> Any:
    """`y` in the strides that eager gives: Python code that reads them was traced with those."""
    if order is None or not isinstance(y, Tensor):
        return y
    if order == sorted(order):
        return y.contiguous()
    return y.permute(order).contiguous().permute(sorted(order, key=lambda d: order[d]))


def _apart(values: Iterator[Any]) -> Iterator[Any]:
    """Copies where two outputs share memory, which eager's do not."""
    seen = set()
    for y in values:
        if isinstance(y, Tensor) and y.numel():
            pointer = y.untyped_storage().data_ptr()
            y = y.clone() if pointer in seen else y
            seen.add(pointer)
        yield y
