"""A graph of TorchDynamo becomes the same dialect of functional ATen that `capture` makes of a model.

`aot_export_module` traces it again, in dynamo's own fake mode: what the trace assumes about symbolic sizes becomes a
guard of dynamo's. (torch.export inside a back end has a mode of its own, and its guards would be lost.) Every input is
still a placeholder in the result, weights too; `Retraced.bind` makes constants of some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxsparse.ir.capture import draws, drop_assertions
from fxsparse.ir.graph import arg, aten, clone, free_name, operator_name, owner, set_tensor
from fxsparse.ir.symbols import open_sizes, symbolic_dims

_RUNNING = ("running_mean", "running_var")
_TRAINING_NORM = (aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.default)


class Unfit(Exception):
    """Not an error: why a graph is left as it is."""


class Training(Unfit):
    """It is left since it is called for training."""


@dataclass(frozen=True)
class View:
    """An output in the memory of input `index`: its shape, strides and offset there; None: it is that input."""

    index: int
    geometry: tuple[tuple[int, ...], tuple[int, ...], int] | None

    def of(self, x: Tensor) -> Tensor:
        """The output, given the input."""
        if self.geometry is None:
            return x
        shape, stride, offset = self.geometry
        return x.as_strided(shape, stride, x.storage_offset() + offset)


@dataclass(frozen=True)
class Retraced:
    """A functional graph whose placeholders are those of dynamo's graph, in order.

    written  indices of the inputs that the model writes to; the first `len(written)` outputs are their new values
    views    by position among the other outputs, those that are views of inputs
    """

    gm: fx.GraphModule
    written: tuple[int, ...]
    views: Mapping[int, View]

    @property
    def dynamic(self) -> list[bool]:
        """For each placeholder: is it a tensor with a symbolic size."""
        return [bool(symbolic_dims(n)) for n in _placeholders(self.gm)]

    @property
    def open_sizes(self) -> bool:
        """Whether another size than the batch is symbolic."""
        return open_sizes(_placeholders(self.gm))

    @property
    def running(self) -> set[int]:
        """Placeholders that are running statistics of a norm: PyTorch writes to them without counting versions."""
        indices = {n: i for i, n in enumerate(_placeholders(self.gm))}
        read = [arg(n, name) for n in self.gm.graph.nodes for name in _RUNNING if _has(n, name)]
        return {indices[n] for n in read if n in indices}

    def bind(self, weights: Mapping[int, tuple[str, Tensor]]) -> fx.GraphModule:
        """A graph of its own in which the inputs `weights` (index: name, value) are constants of these names.

        Symbolic sizes that dynamo passes as numbers are read from the shapes, so only tensors are left as inputs.
        """
        gm = clone(self.gm)
        nodes = _placeholders(gm)
        for index, (name, tensor) in weights.items():
            name = free_name(gm, name)
            set_tensor(gm, name, tensor)
            with gm.graph.inserting_before(nodes[index]):
                constant = gm.graph.get_attr(name)
            constant.meta.update(nodes[index].meta)
            _replace(gm, nodes[index], constant)
        _sizes_from_shapes(gm)
        gm.graph.lint()
        gm.recompile()
        return gm


def retrace(gm: fx.GraphModule) -> Retraced:
    """Trace dynamo's `gm` again. Raises Unfit when it cannot be, or when an inference compiler cannot use it."""
    _refuse_state(gm)
    _specialize_numbers(gm)
    views = _views(gm)
    inputs = _placeholders(gm)
    try:
        traced, signature = _export(gm, [n.meta["example_value"] for n in inputs])
    except Exception as error:  # noqa: BLE001 - a graph of the user's operators: the trace may raise anything
        first = next(iter(str(error).splitlines()), "")[:200]
        raise Unfit(f"it cannot be traced again ({type(error).__name__}: {first})") from None
    if signature.inputs_to_parameters or signature.inputs_to_buffers:
        raise Unfit("its weights are attributes of the graph (torch._inductor.config.freezing is set globally)")
    _tidy(traced)
    order = {n.name: i for i, n in enumerate(_placeholders(traced))}
    _refuse(traced)
    return Retraced(traced, tuple(order[name] for name in signature.user_inputs_to_mutate.values()), views)


def _export(gm: fx.GraphModule, fakes: list[Any]) -> tuple[fx.GraphModule, Any]:
    from torch._functorch.aot_autograd import aot_export_module

    with torch.no_grad(), fx.traceback.preserve_node_meta():
        traced, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    return cast(fx.GraphModule, traced), signature


def _has(node: fx.Node, name: str) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.name == name for a in schema.arguments)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _replace(gm: fx.GraphModule, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    gm.graph.erase_node(node)


def _refuse_state(gm: fx.GraphModule) -> None:
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise Unfit("autocast is on, which casts behind the graph's back: convert the model (model.bfloat16())")
    if any("example_value" not in n.meta for n in _placeholders(gm)):
        raise Unfit("TorchDynamo does not say what goes into it")
    if not all(isinstance(n, fx.Node) for n in outputs_of(gm)):
        raise Unfit("it returns a constant")
    unknown = [n.name for n in gm.graph.nodes if free_unbacked_symbols(n.meta.get("example_value"))]
    if unknown:
        raise Unfit(f"{unknown[0]} has a size or value that depends on the data")


def _views(gm: fx.GraphModule) -> dict[int, View]:
    """Outputs that share memory with an input: who writes to one expects to see it in the other.

    Raises Unfit for two outputs that share memory of their own, and for views that depend on symbolic sizes.
    """
    values = [n.meta["example_value"] for n in _placeholders(gm)]
    inputs = {_storage(value): (i, value) for i, value in enumerate(values) if _strided(value)}
    own, views = set(), {}
    for i, node in enumerate(outputs_of(gm)):
        value: Any = node.meta.get("example_value")
        if not _strided(value):
            continue
        storage = _storage(value)
        if storage in inputs:
            views[i] = _view(node, value, *inputs[storage])
        elif storage in own:
            raise Unfit(f"its output {node.name} shares memory with another output")
        own.add(storage)
    return views


def _view(node: fx.Node, value: Tensor, index: int, base: Tensor) -> View:
    mine, its = [[*x.shape, *x.stride(), x.storage_offset()] for x in (value, base)]
    if list(map(str, mine)) == list(map(str, its)) and value.dtype == base.dtype:
        return View(index, None)
    if value.dtype != base.dtype or not all(isinstance(n, int) for n in [*mine, *its]):
        raise Unfit(f"its output {node.name} is a view of an input, of another dtype or with symbolic sizes")
    return View(index, (tuple(value.shape), tuple(value.stride()), int(mine[-1] - its[-1])))


def _strided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def outputs_of(gm: fx.GraphModule) -> list[Any]:
    """What dynamo's graph returns, one after the other."""
    (out,) = [n for n in gm.graph.nodes if n.op == "output"]
    return list(cast(Any, out.args[0]))


def _specialize_numbers(gm: fx.GraphModule) -> None:
    """Have dynamo trace again with constants for the floats that dynamic=True made inputs (the eps of a batch norm).

    Inductor asks for the same, in the same way, when it cannot keep one as a tensor.
    """
    items = [n for n in gm.graph.nodes if n.op == "call_method" and n.target == "item"]
    numbers = [v for n in items if isinstance(v := n.meta.get("example_value"), torch.SymFloat)]
    symbols = {
        str(s) for v in numbers for s in cast(Any, v.node)._expr.free_symbols
    }  # `expr` loses those with a known value
    if symbols:
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.symbolic_convert import TensorifyState

        for symbol in symbols:
            TensorifyState.specialize(symbol)
        raise TensorifyScalarRestartAnalysis


def _tidy(gm: fx.GraphModule) -> None:
    drop_assertions(gm)
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:  # the whole graph runs without gradients
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _refuse(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
            raise Unfit(f"it has the control flow operator {node.target}")
        seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if seeded and draws(node):
            raise Training(f"{operator_name(node)} ({owner(node)}) draws random numbers")
        if node.target in _TRAINING_NORM:  # without running statistics it is a function of its input, in every mode
            raise Training(f"batch norm ({owner(node)}) is in training mode")
        value = node.meta.get("val")
        if isinstance(value, Tensor) and type(value).__name__ != "FakeTensor":
            raise Unfit(f"{node.name} is a {type(value).__name__}")
    _refuse_symbols(_placeholders(gm))


def _refuse_symbols(inputs: Sequence[fx.Node]) -> None:
    known = _where_sizes_are(inputs)
    for node in inputs:
        value = node.meta["val"]
        if not isinstance(value, Tensor) and node.users and str(value) not in known:
            raise Unfit(f"it computes with the number {value}, which is no size of an input")


def _where_sizes_are(inputs: Sequence[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """An input and a dimension for each symbolic size of one."""
    return {str(node.meta["val"].shape[dim]): (node, dim) for node in reversed(inputs) for dim in symbolic_dims(node)}


def _sizes_from_shapes(gm: fx.GraphModule) -> None:
    """Dynamo passes a symbolic size as a number of its own; `capture` reads it from a tensor: so does this."""
    inputs = _placeholders(gm)
    sources = _where_sizes_are(inputs)
    for node in inputs:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            continue
        if node.users:
            with gm.graph.inserting_after(inputs[-1]):
                size = gm.graph.call_function(aten.sym_size.int, sources[str(value)])
            size.meta["val"] = value
            node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
