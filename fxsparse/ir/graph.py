"""Small helpers every pass uses: tensors of a graph, arguments by their schema name, owners, fake shapes."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from fxsparse.errors import CaptureError

aten = torch.ops.aten


def get_tensor(gm: fx.GraphModule, name: str) -> Tensor:
    """The parameter or buffer `name` ("layer1.0.conv1.weight") of `gm`."""
    module: Any = gm
    for part in name.split("."):
        module = getattr(module, part)
    return cast(Tensor, module)


def has_attribute(gm: nn.Module, name: str) -> bool:
    """Whether the dotted path `name` exists in `gm`."""
    module: Any = gm
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def set_tensor(gm: nn.Module, name: str, tensor: Tensor) -> None:
    """Store `tensor` as buffer `name`, making the modules on the way. What was there is replaced, not written to."""
    *path, leaf = name.split(".")
    module: nn.Module = gm
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = cast(nn.Module, getattr(module, part))
    if hasattr(module, leaf):
        delattr(module, leaf)
    module.register_buffer(leaf, tensor.detach())


def free_name(gm: nn.Module, name: str) -> str:
    """`name`, or `name_1`, `name_2` ... when it is taken."""
    candidate, i = name, 0
    while has_attribute(gm, candidate):
        i += 1
        candidate = f"{name}_{i}"
    return candidate


def input_devices(gm: fx.GraphModule) -> set[torch.device]:
    """Where the inputs are, as their fake values say."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    return {value.device for value in values if isinstance(value, Tensor)}


def on_gpu(gm: fx.GraphModule) -> bool:
    """Whether any weight is on a CUDA device."""
    return any(b.is_cuda for b in gm.buffers())


def weight_of(gm: fx.GraphModule, node: object) -> Tensor | None:
    """The tensor of a get_attr node; None for any other node or value."""
    return get_tensor(gm, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def new_weight(gm: fx.GraphModule, before: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """A get_attr node for a new tensor, inserted before `before`; it carries the provenance of its user."""
    name = free_name(gm, name)
    set_tensor(gm, name, tensor)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(name)
    return _of_module(node, before)


def call_for(gm: fx.GraphModule, node: fx.Node, op: Any, *args: Any) -> fx.Node:
    """A call with the provenance of `node`, in whose place it comes, at the graph's insertion point."""
    return _of_module(gm.graph.call_function(op, args), node)


def _of_module(made: fx.Node, node: fx.Node) -> fx.Node:
    if "nn_module_stack" in node.meta:
        made.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    return made


def is_ours(node: fx.Node) -> bool:
    """Whether it calls one of fxsparse's operators."""
    return getattr(node.target, "namespace", "") == "fxsparse"


def replace_weight(gm: fx.GraphModule, node: fx.Node, tensor: Tensor) -> None:
    """Give the get_attr `node` another tensor. A name that other nodes read too is left alone: a new one is taken."""
    name = str(node.target)
    if any(n is not node and n.op == "get_attr" and n.target == name for n in gm.graph.nodes):
        name = free_name(gm, name)
        node.target = name
    set_tensor(gm, name, tensor)


def arg(node: fx.Node, name: str) -> Any:
    """The argument called `name` in the operator's schema, its default when it was not given.

    Raises KeyError when the schema has no such argument.
    """
    schema = cast(Any, node.target)._schema
    for i, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[i] if not parameter.kwarg_only and i < len(node.args) else parameter.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")


def set_arg(node: fx.Node, name: str, value: Any) -> None:
    """Set the argument called `name` in the operator's schema, filling defaults before it."""
    arguments = cast(Any, node.target)._schema.arguments
    index = next(i for i, parameter in enumerate(arguments) if parameter.name == name)
    if name in node.kwargs or arguments[index].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    args = list(node.args)
    args += [parameter.default_value for parameter in arguments[len(args) : index + 1]]
    args[index] = value
    node.args = tuple(args)


def owner(node: fx.Node) -> str:
    """Path of the module that made the node ("layer1.0.conv1"), the node's own name at the top level."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = re.sub(r"^[LG]\['[^']+'\]\.?|@\d+$", "", re.sub(r"\._modules\['([^']+)'\]", r".\1", path)).strip(".")
    return path or node.name


def operator_name(node: fx.Node) -> str:
    """`conv2d` for aten.conv2d.default, the Python name for other callables, the op for the rest."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return str(getattr(node.target, "__name__", node.op))


def erase_unused(gm: fx.GraphModule) -> None:
    """Drop nodes nobody reads (placeholders stay: they are the signature), and tensors no node reads."""
    gm.graph.eliminate_dead_code()
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for path, module in list(gm.named_modules()):
        for leaf in [*module._parameters, *module._buffers]:
            if f"{path}.{leaf}".lstrip(".") not in used:
                delattr(module, leaf)
    gm.recompile()


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own: fresh nodes (meta kept), fresh module tree, the same tensors.

    No export hooks and no tracer class come along, only the tensors the graph reads.
    """
    graph, copies = fx.Graph(), cast("dict[fx.Node, fx.Node]", {})
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.set_codegen(copy.copy(gm.graph._codegen))
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr" and not has_attribute(root, str(node.target)):
            set_tensor(root, str(node.target), get_tensor(gm, str(node.target)))
    return fx.GraphModule(root, graph).eval()


def release(gm: fx.GraphModule) -> None:
    """Let go of the tensors of a graph that nobody needs any more.

    A graph and its module refer to each other, so Python frees them late: a large model's weights in float64 are much.
    """
    for module in gm.modules():
        module._buffers.clear()
        module._parameters.clear()


def fake_mode(gm: fx.GraphModule) -> Any:
    """The mode that the shapes in `gm` belong to: symbolic sizes mean something in it only."""
    return next(v.fake_mode for n in gm.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))


@contextlib.contextmanager
def without_data(gm: fx.GraphModule) -> Iterator[Any]:
    """Inside, operators on the fake values in `gm` give shapes, and symbolic sizes stay symbolic. Gives the mode."""
    mode = fake_mode(gm)
    with mode, torch.no_grad(), enable_python_dispatcher():  # without it some operators ask for sizes in C++
        yield mode


def refresh(gm: fx.GraphModule) -> None:
    """Propagate fake shapes again after a rewrite: updates meta["val"], and a wrong shape raises, without data.

    Symbolic sizes stay symbolic; weights get their new static shapes.
    """
    flattened = flat(gm)
    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    with without_data(gm) as mode:
        _Refresh(flattened, lambda t: mode.from_tensor(t, static_shapes=True)).run(*inputs)
    for node, fresh in zip(gm.graph.nodes, flattened.graph.nodes, strict=True):
        if "val" in fresh.meta:
            node.meta["val"] = fresh.meta["val"]
    gm.recompile()


def _no_shape(n: fx.Node, error: Exception) -> CaptureError:
    what = next(iter(str(error).splitlines()), "")[:300]
    return CaptureError(
        f"operator {operator_name(n)} in {owner(n)}",
        expected="a shape that can be worked out without data",
        got=f"{type(error).__name__}: {what}",
        do="Some operators cannot with a symbolic batch: try dynamic_batch=False. If that fails too, please report it.",
    )


class _Refresh(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, fake: Callable[[Tensor], Tensor]) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # it would be appended to our own errors
        self.fake = fake

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fake(get_tensor(cast(fx.GraphModule, self.module), target))

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:  # noqa: BLE001 - whatever the operator's shape function raises
            raise _no_shape(n, error) from None
        if n.op != "output":
            n.meta["val"] = value
        return value


def flat(gm: fx.GraphModule) -> fx.GraphModule:
    """A clone that takes the flattened inputs and returns the flattened outputs, as back ends want it."""
    result = clone(gm)
    result.graph.set_codegen(fx.graph.CodeGen())  # a plain argument list: no pytrees of the user's signature
    result.recompile()
    return result


def call_nodes(gm: fx.GraphModule, *targets: object) -> Iterator[fx.Node]:
    """Nodes that call one of `targets`; a snapshot, so the graph may be changed while iterating."""
    yield from [n for n in gm.graph.nodes if n.op == "call_function" and n.target in targets]
