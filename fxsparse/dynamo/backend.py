"""What torch.compile calls, graph by graph: a graph to build, or a dense one and the reason."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn

from fxsparse.dynamo.graph import Function, Graph, Masked, graph_name
from fxsparse.dynamo.settings import Settings, read_options
from fxsparse.errors import FxSparseError
from fxsparse.ir.retrace import Training, Unfit, retrace

log = logging.getLogger("fxsparse")


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
        settings = read_options({} if options is None else options, mode)
        weights = weights_of(gm, example_inputs, settings)
        settings.masks_of([x for x in example_inputs if isinstance(x, nn.Parameter)])
    except FxSparseError as error:
        return functools.partial(_raise, error)
    try:
        _refuse(example_inputs, weights)
        retraced = retrace(gm)
        if retraced.open_sizes and settings.options.target.standard_operators:
            raise Unfit(
                f"it has a symbolic size that is not the batch, and target {settings.options.target.name!r} takes none"
            )
        if any(view.index in weights for view in retraced.views.values()):
            raise Unfit("one of its outputs is a view of a weight")
        return Graph(gm, retraced, weights, settings).run
    except Unfit as reason:
        _tell(reason)
        return _dense(gm, example_inputs, settings)


def _raise(error: FxSparseError, *args: Any) -> NoReturn:
    raise error.with_traceback(None) from None


def weights_of(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> dict[int, str]:
    """Index -> name of the inputs that are parameters or buffers: of the model, by identity, or of another module."""
    names = settings.names()
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
    inputs = [x for i, x in enumerate(example_inputs) if isinstance(x, Tensor) and i not in weights]
    if not inputs:
        raise Unfit("nothing but weights goes into it")
    if any(x.layout is not torch.strided or x.is_nested or 0 in x.shape for x in inputs):
        raise Unfit("an input is empty, or no dense tensor")


def _tell(reason: Unfit) -> None:
    if isinstance(reason, Training):
        warnings.warn(
            "fxsparse compiles for inference: what is called with gradients or in training mode stays dense, on "
            "Inductor. For inference call model.eval(), and the compiled model under torch.no_grad().",
            UserWarning,
            stacklevel=2,
        )
    level = logging.INFO if "no weights" in str(reason) else logging.WARNING
    log.log(level, "%s stays dense: %s", graph_name(), reason)


def _dense(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Function:
    """The graph as it is on Inductor (or in eager, with that target); masks are applied to its inputs at every call."""
    from torch._dynamo.backends.registry import lookup_backend

    name = "eager" if settings.options.target.name == "eager" else "inductor"
    run = cast(Function, lookup_backend(name)(gm, list(example_inputs)))
    masked = [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)]
    return Masked(run, masked, settings).run if settings.masks is not None else run
