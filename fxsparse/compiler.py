"""compile() and plan(): capture -> passes -> lower -> verify -> measure."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.arguments import check_bool, check_cache_dir, checked_inputs, checked_model
from fxsparse.backend import TARGETS, Target, find_target
from fxsparse.backend.target import COMPILING
from fxsparse.contest import Contest, contest
from fxsparse.doubts import warn_of_doubts
from fxsparse.errors import CaptureError, InputError, TargetError, VerificationError, first_line, near
from fxsparse.explain import Layer, layers_of, parameters_after, rows_of, with_formats, without_a_row
from fxsparse.formats import FORMATS
from fxsparse.ir.capture import capture, masked_output
from fxsparse.ir.decision import Plan
from fxsparse.ir.graph import clone, erase_unused, flat, on_gpu
from fxsparse.ir.inputs import Call, batch_size, device_of, signature_of
from fxsparse.ir.masks import Masks
from fxsparse.ir.symbols import concrete, open_sizes, symbolic_dims
from fxsparse.machine import device_name
from fxsparse.measure import LayerTimes
from fxsparse.module import Build, SparseModule, without_autocast
from fxsparse.passes import STORAGE, STRUCTURE, Context, canonicalize, name_of
from fxsparse.passes import run as run_passes
from fxsparse.readers import Checkpoint, read
from fxsparse.report import Report, Row
from fxsparse.verify import Reference, check, probed

log = logging.getLogger("fxsparse")

# Compilations of one process time no layer twice, and choose the same formats, whichever entrance they came in by.
_LAYER_TIMES: dict[str, dict[str, float]] = {}
ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | Tensor | None
MaskSource = Masks | Mapping[str, Tensor] | str | os.PathLike[str] | None
_REPRODUCE = "Please report it: run fxsparse.compile(..., target='eager', verify='each') to name the pass."


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked arguments of `compile`."""

    target: Target
    dynamic_batch: bool
    formats: str
    verify: str
    measure: bool
    cache_dir: str | os.PathLike[str] | None


@dataclasses.dataclass
class Captured:
    """A model as one flat graph, whichever front end made it: torch.export here, TorchDynamo in `fxsparse.dynamo`.

    gm          its weights are constants with masked values, and its own: the graph is rewritten in place
    leaves      example inputs, flattened
    own         flattened inputs -> outputs of the user's own code with masked weights, to compare with
    masks       for the report
    parameters  their number, for the report
    """

    gm: fx.GraphModule
    leaves: list[Any]
    own: Callable[[Sequence[Any]], Any]
    masks: Masks
    parameters: int

    def shapes(self, more: int) -> list[list[int]]:
        """Of the inputs at one sample more, other symbolic sizes `more` than the example's."""
        return [concrete(node, self.batch + 1, more) for node in self.inputs]

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, one for each leaf."""
        return self.gm.graph.find_nodes(op="placeholder")

    @property
    def open_sizes(self) -> bool:
        """Whether another size than the batch is symbolic."""
        return open_sizes(self.inputs)

    @property
    def batch(self) -> int:
        """The example's batch size."""
        of_batch = [x for node, x in zip(self.inputs, self.leaves, strict=True) if 0 in symbolic_dims(node)]
        return batch_size(of_batch or self.leaves)


@dataclasses.dataclass
class _Rewritten:
    """A model after the passes, and everything the report wants to know about it."""

    captured: Captured
    dense: fx.GraphModule
    gm: fx.GraphModule
    plan: Plan
    rows: list[Row]
    reference: Reference | None
    without_formats: _Rewritten | None = None

    def as_chosen(self, gm: fx.GraphModule) -> _Rewritten:
        """The one of the two that `gm` belongs to."""
        other = self.without_formats
        return other if other is not None and gm is other.gm else self


def compile(
    model: nn.Module,
    masks: MaskSource = None,
    target: str = "inductor",
    *,
    example_inputs: ExampleInputs = None,
    dynamic_batch: bool = True,
    formats: str = "auto",
    verify: str = "end",
    measure: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> SparseModule:
    """The masked model as a module that computes the same function, faster. `model` is not modified.

    model           compiled as it computes in evaluation mode, with a warning where its own mode is another
    masks           Masks, a dict by parameter name (bool, uint8 or float 0/1), a path of anything that `fxsparse.read`
                    reads (for its weights, load them), or None: then zeros in the weights and torch.nn.utils.prune
                    masks are found
    target          "inductor" (default), "auto" (Inductor, ONNX Runtime on a CPU or eager on a GPU: what is measured
                    fastest, and Inductor if nothing is), "inductor_cpp" (its calls in C++), "eager", "onnx" (ONNX
                    Runtime, CPU) or "tensorrt"
    example_inputs  a tuple of positional inputs, or a dict of inputs by name, with the batch in dimension 0; None:
                    compile at the first call
    dynamic_batch   accept any batch size
    formats         how the remaining weights are stored. "auto": dense or a sparse format, whichever is measured faster
                    (or, on a CPU with measure=False, holds clearly less); "dense": always dense; a format's name,
                    "shuffled_block", "unstructured" or "n_m": wherever it fits and saves work, whatever the time
    verify          "end": compare with the masked model once; "each": after every pass, naming the one that broke it;
                    "off"
    measure         time the result against the best dense build, and return that build when it is faster
    cache_dir       folder for measured layer times; None keeps them in memory only
    Raises MaskError, InputError, CaptureError, TargetError or VerificationError, each with the way out.
    """
    options = checked_options(target, dynamic_batch, formats, verify, measure, cache_dir)
    given = as_checkpoint(masks)
    found = given.masks.check(checked_model(model))
    warn_of_doubts(model, found, given, masks)
    module = SparseModule(functools.partial(_build, model, found, options))
    return module if example_inputs is None else module.prepare(example_inputs)


@torch.inference_mode(False)  # the analysis differentiates
def plan(
    model: nn.Module,
    masks: MaskSource = None,
    example_inputs: ExampleInputs = None,
    *,
    target: str = "inductor",
    dynamic_batch: bool = True,
) -> Report:
    """A dry run: what `compile` would remove, what it would not, and why. Builds and times nothing.

    Arguments and errors as for `compile`; example inputs are needed, since shapes decide what can be removed.
    """
    options = checked_options(target, dynamic_batch, "auto", "off", False, None)
    if example_inputs is None:
        raise InputError("example_inputs of plan", expected="a tuple of inputs, or a dict by name", got="None",
                         do="A dry run needs shapes: plan(model, masks, (torch.randn(1, 3, 224, 224),)).")  # fmt: skip
    call = checked_inputs(Call.of(example_inputs))
    found = as_checkpoint(masks).masks.check(checked_model(model))
    with COMPILING, without_autocast():
        rewritten = _rewrite(_capture(model, found, call, options), options)
    return dataclasses.replace(_report(rewritten, options), chosen="not measured")


def _build(model: nn.Module, masks: Masks, options: Options, call: Call) -> Build:
    call = checked_inputs(call)
    with torch.inference_mode(False):
        captured = _capture(model, masks, call, options)
    out_spec = _out_spec(captured.gm)
    built = build(captured, pytree.tree_structure(tuple(call)), out_spec, options)
    return dataclasses.replace(built, signature=signature_of(model))


@torch.inference_mode(False)  # the analysis differentiates
def build(captured: Captured, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec, options: Options) -> Build:
    """Rewrite, lower, measure and verify: what both entrances, `compile` and torch.compile, come to."""
    rewritten = _rewrite(captured, options)
    won, verification = _verified(rewritten, options)
    rewritten = rewritten.as_chosen(won.sparse)
    report = _report(rewritten, options)
    decisions = report.decisions + won.decisions
    report = dataclasses.replace(report, verification=verification, decisions=decisions, **won.for_report())
    return Build(won.gm, captured.leaves, in_spec, out_spec, options.target, won.run, report, options.dynamic_batch,
                 won.prepare, any_batch=won.run if won.any_size else None, lowered_by=won.target)  # fmt: skip


def _verified(rewritten: _Rewritten, options: Options) -> tuple[Contest, str]:
    """What won, and how far it is off. Of several targets, one that computes something else is left out."""
    captured, without = rewritten.captured, rewritten.without_formats
    compete = functools.partial(
        contest, rewritten.dense, rewritten.gm, captured.leaves, measure=options.measure,
        also={"dense weights": without.gm} if without is not None else {}, any_size=captured.open_sizes,
    )  # fmt: skip
    won = compete(options.target)
    try:
        return won, _verify(rewritten.as_chosen(won.sparse), won, options)
    except VerificationError as error:
        if not won.target.standard_operators or won.target.name not in options.target.runners[1:]:
            raise
        won = compete(find_target(options.target.runners[0])).after(won.target, error)
        return won, _verify(rewritten.as_chosen(won.sparse), won, options)


def _capture(model: nn.Module, masks: Masks, call: Call, options: Options) -> Captured:
    log.info("capture")
    gm = capture(model, call.args, masks, call.kwargs, dynamic_batch=options.dynamic_batch)
    leaves, in_spec = pytree.tree_flatten(tuple(call))

    def own(leaves: Sequence[Any]) -> Any:
        try:
            return masked_output(model, masks, Call(*pytree.tree_unflatten(leaves, in_spec)))
        except (RuntimeError, ValueError, IndexError) as error:  # captured at two samples, it may not take one
            raise InputError("example_inputs", expected="inputs that the model itself runs on", got=first_line(error),
                             do="Give inputs of a batch that it takes, or pass verify='off'.") from None  # fmt: skip

    parameters = sum(p.numel() for p in model.parameters())
    return Captured(gm, leaves, own, masks or _found_in(model), parameters)


def _found_in(model: nn.Module) -> Masks:
    """Masks that nobody gave: of torch.nn.utils.prune, by the weights' own names, or the zeros."""
    pruned = {name.removesuffix("_orig"): mask for name, mask in Masks.from_prune(model).items()}
    return Masks({**Masks.from_zeros(model), **pruned})


def _rewrite(captured: Captured, options: Options) -> _Rewritten:
    """Run the passes on the captured graph."""
    gm, leaves = captured.gm, captured.leaves
    erase_unused(gm)
    plan = run_passes(gm, [canonicalize], Context())  # canonicalize is no rewriting: the dense builds get it too
    dense, layers = clone(gm), layers_of(gm)
    ref = None
    if options.verify != "off":
        ref = probed(flat(dense), leaves)
        own = captured.own(ref.inputs)
        check(pytree.tree_leaves(own), ref, "captured graph", "The front end changed the model: please report it.")
    times = LayerTimes(options.cache_dir, captured.batch, _LAYER_TIMES)
    times_layers = options.measure and not options.target.standard_operators
    if times_layers:
        log.info("time layers")
        for layer in layers:
            layer.dense_us = times(layer.node, *layer.shape[:2]) * 1e6
    ctx = _context(leaves, times, options)
    after_each = _after_each(gm, ref, options)
    plan += run_passes(gm, STRUCTURE, ctx, after_each)
    if times_layers:
        _time_again(gm, layers, times)
    rows = rows_of(gm, layers, ctx, plan)
    # Models are timed with formats and without where layers cannot be, or say less: a GPU's are short.
    whole = options.target.standard_operators or options.target.runners or on_gpu(gm)
    shrunk = clone(gm) if whole and options.formats == "auto" else None
    stored = run_passes(gm, STORAGE, ctx, after_each)
    times.save()
    plan = plan + without_a_row(dense, rows, captured.masks, plan)
    other = None
    if shrunk is not None and any(d.step == "lower_formats" for d in stored.accepted):
        other = _Rewritten(captured, dense, shrunk, plan + _outdone(stored), rows, ref)
    return _Rewritten(captured, dense, gm, plan + stored, with_formats(rows, layers, stored), ref, other)


def _outdone(stored: Plan) -> Plan:
    """What was decided about formats, for the report of a build without them."""
    chosen = [d for d in stored if d.step == "choose_formats"]
    why = "a build without formats was faster"
    return Plan(tuple(
        dataclasses.replace(d, why=f"{d.why}; {why}", accepted=False) if d.accepted else d for d in chosen
    ))  # fmt: skip


def _context(leaves: list[Any], times: LayerTimes, options: Options) -> Context:
    names = options.target.formats(device_of(leaves)) if options.formats != "dense" else ()
    forced = options.formats in FORMATS
    timed = options.measure and not options.target.standard_operators
    return Context(
        time_layer=times if timed else None,
        time_format=times.of_format if timed else None,
        time_turn=times.of_turn if timed else None,
        batch=times.batch,
        standard_operators=options.target.standard_operators,
        formats=(options.formats,) if forced else names,
        force_formats=forced,
    )


def _time_again(gm: fx.GraphModule, layers: list[Layer], times: LayerTimes) -> None:
    alive = set(gm.graph.nodes)
    for layer in layers:
        if layer.node in alive:
            weight = layer.node.args[1].meta["val"]  # type: ignore[union-attr]
            layer.sparse_us = times(layer.node, *weight.shape[:2]) * 1e6


def _after_each(gm: fx.GraphModule, ref: Reference | None, options: Options) -> Any:
    def check_pass(step: ModuleType) -> None:
        if options.verify == "each" and ref is not None:
            with torch.no_grad():
                check(flat(gm)(*ref.inputs), ref, f"pass {name_of(step)}", "The pass is wrong: please report it.")

    return check_pass


def _verify(rewritten: _Rewritten, won: Contest, options: Options) -> str:
    """The graph in eager, at the example's batch and at another one; then what will really run."""
    ref = rewritten.reference
    if ref is None:
        return "not verified (verify='off')"
    log.info("verify")
    with torch.no_grad():
        check(flat(rewritten.gm)(*ref.inputs), ref, "rewritten graph", _REPRODUCE)
        if options.dynamic_batch:
            other = _elsewhere(rewritten, ref)
            check(flat(rewritten.gm)(*other.inputs), other, "rewritten graph at another batch size", _REPRODUCE)
            if won.any_size:
                check(
                    won.run(*won.prepare(other.inputs)),
                    other,
                    f"target {options.target.name!r}, other sizes",
                    _REPRODUCE,
                )
        return check(won.run(*won.prepare(ref.inputs)), ref, f"target {options.target.name!r}",
                     "The graph was right before lowering: try target='eager', and please report it.")  # fmt: skip


def _elsewhere(rewritten: _Rewritten, ref: Reference) -> Reference:
    """The masked model at other sizes. Raises CaptureError when a size that is open cannot be changed after all."""
    captured, failed = rewritten.captured, ""
    for more in (1, -1) if captured.open_sizes else (0,):  # a table of positions may end here, a window begin
        try:
            return probed(flat(rewritten.dense), ref.inputs, captured.shapes(more), seed=1)
        except (RuntimeError, IndexError, ValueError) as error:
            if not captured.open_sizes:
                raise
            failed = first_line(error)
    raise CaptureError("sizes of the inputs", expected="a graph that runs at others too", got=failed,
                       do="Make code for each size: torch.compile(dynamic=False), or mark_static(x, dim).")  # fmt: skip


def _report(rewritten: _Rewritten, options: Options) -> Report:
    rows, captured = rewritten.rows, rewritten.captured
    return Report(
        target=options.target.name,
        decisions=rewritten.plan.decisions,
        rows=tuple(rows),
        params_before=captured.parameters,
        params_after=parameters_after(rewritten.gm),
        macs_before=sum(r.macs_before for r in rows),
        macs_after=sum(r.macs_after for r in rows),
        environment=environment(captured.leaves),
        masks=captured.masks,
    )


def environment(inputs: Any) -> dict[str, str]:
    """What a number depends on: versions, machine, threads, shapes, date."""
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    device = device_of(tensors)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "inputs": ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors),
        "date": date.today().isoformat(),
    }


def checked_options(
    target: str,
    dynamic_batch: bool,
    formats: str,
    verify: str,
    measure: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> Options:
    """These arguments of `compile` as Options. Raises InputError or TargetError for a wrong one."""
    check_bool("dynamic_batch", dynamic_batch)
    check_bool("measure", measure)
    found = Options(_checked(target, formats, verify), dynamic_batch, formats, verify, measure, cache_dir)
    check_cache_dir(cache_dir)
    return found


def _checked(target: str, formats: str, verify: str) -> Target:
    for name, value, known in (
        ("formats", formats, ("auto", "dense", *FORMATS)),
        ("verify", verify, ("end", "each", "off")),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r}", expected=f"one of {', '.join(map(repr, known))}",
                             got=type(value).__name__ if not isinstance(value, str) else repr(value),
                             do=near(str(value), known) or f"Leave {name} at its default.")  # fmt: skip
    if not isinstance(target, str):
        raise TargetError(f"target {repr(target)[:40]}", expected="the name of a target", got=type(target).__name__,
                          do="Pass target='inductor', the default; inputs go to example_inputs=(x,).")  # fmt: skip
    return find_target(target)


def as_checkpoint(masks: MaskSource) -> Checkpoint:
    """Masks of whatever the user gave, none for None, and the weights beside them in a file.

    Raises InputError or MaskError.
    """
    if not isinstance(masks, (str, os.PathLike)):
        return Checkpoint("arguments", _given(masks))
    if masks in TARGETS and not os.path.exists(masks):
        raise InputError("masks", expected="Masks, a dict by parameter name, a path or None",
                         got=f"{masks!r}, the name of a target and of no file",
                         do=f"Did you mean target={masks!r}? The second argument is the masks.")  # fmt: skip
    return read(masks)


def _given(masks: Masks | Mapping[str, Tensor] | None) -> Masks:
    if masks is None or isinstance(masks, Masks):
        return masks or Masks()
    if not isinstance(masks, Mapping):
        raise InputError("masks", expected="Masks, a dict by parameter name, a path or None", got=type(masks).__name__,
                         do="For zeros that are already in the weights, leave masks out.")  # fmt: skip
    return Masks(masks)


def _out_spec(gm: fx.GraphModule) -> pytree.TreeSpec:
    info = getattr(gm.graph._codegen, "pytree_info", None)
    assert info is not None  # torch.export always records it
    spec: pytree.TreeSpec = info.out_spec
    return spec
