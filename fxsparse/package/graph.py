"""A graph module as JSON and tensors, and back. Reading looks names up in lists; it runs no operator.

A graph is {"nodes": [...], "weights": {name: [tensor, order of its dimensions, device]}, "inputs": names,
"in": structure, "out": structure}, a node one of

    ["input", name, target]                                ["weight", name, weight]
    ["call", name, operator, args, kwargs, module path]    ["output", args]

Operators are functional ATen ("aten::conv2d", "aten::add.Tensor"), those of our formats ("fxsparse::shuffled_block")
and arithmetic on sizes ("python::mul"). torch.fx writes a graph's names into Python source that it runs, so names are
looked at as strictly as operators.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxsparse.errors import PackageError
from fxsparse.formats import BY_OPERATOR
from fxsparse.ir.graph import get_tensor, owner
from fxsparse.package.values import MODEL_AND_MASKS, Json, cannot_save, decode, decode_spec, encode, encode_spec
from fxsparse.rules import RULES

_ARITHMETIC = "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge"
_PYTHON: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in _ARITHMETIC.split()},
    **{name: getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not")},
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}
# Functional in name only, or trusting in sizes and numbers in their arguments: none is in a graph that is captured.
_REFUSED = re.compile(
    r"set|from_file|resize.*|empty.*|new_empty.*|as_strided.*|slice_inverse|segment_reduce|fractional_max_pool.*|"
    r"native_.*|batch_norm_.*|.*(backward|forward|jvp).*|.*(sparse|nested|quantized|qparams).*|to_padded_tensor|"
    r"(cudnn|fbgemm|miopen|mkldnn|mps)_.*|(linalg_)?lu_solve|linalg_ldl_solve|ctc_loss"
)
# Names with an underscore are torch's own business, other than these.
_UNDERSCORED = re.compile(
    r"__(and|lshift|or|rshift|xor)__|_assert_scalar|_conj|_log_softmax|_neg_view|_upsample_(bicubic|bilinear)2d_aa"
)
_ZEROED = {"empty_like": "zeros_like", "new_empty": "new_zeros"}  # what was in memory before is nobody's to read
_OPERATOR = re.compile(r"(aten|fxsparse|python)::(\w+)(?:\.(\w+))?")


def encode_graph(gm: fx.GraphModule) -> tuple[Json, dict[str, Tensor]]:
    """`gm` as JSON, and its tensors by name. Raises InputError for what cannot be written down."""
    weights, tensors = _encode_weights(gm)
    number: dict[fx.Node, int] = {}
    nodes = []
    for node in gm.graph.nodes:
        nodes.append(_encode_node(node, number.__getitem__))
        number[node] = len(number)
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    content = {"nodes": nodes, "weights": weights, "inputs": info.orig_args}
    return content | {"in": encode_spec(info.in_spec), "out": encode_spec(info.out_spec)}, tensors


def decode_graph(content: Json, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph module again, without fake shapes. Raises PackageError for what `encode_graph` does not write."""
    try:
        root = _root(content["weights"], tensors)
        graph, nodes = fx.Graph(), cast("list[fx.Node]", [])
        for item in content["nodes"]:
            nodes.append(_decode_node(graph, root, item, nodes))
        info = fx.graph._PyTreeInfo(_names(content["inputs"]), decode_spec(content["in"]), decode_spec(content["out"]))
        _check_signature(nodes, info)
        graph.set_codegen(fx.graph._PyTreeCodeGen(info))
        graph.lint()
        return fx.GraphModule(root, graph).eval()
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, SyntaxError) as error:
        raise unreadable(f"{type(error).__name__}: {str(error)[:200]}") from None


def _encode_weights(gm: fx.GraphModule) -> tuple[Json, dict[str, Tensor]]:
    """Tied ones are stored once. safetensors has no strides: they become an order of dimensions."""
    weights: dict[str, Json] = {}
    tensors: dict[str, Tensor] = {}
    stored: dict[tuple[Any, ...], str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in weights:
            tensor = get_tensor(gm, node.target)
            if tensor.dtype == torch.complex128:  # unknown to safetensors
                raise cannot_save(
                    f"{node.target!r} of {tensor.dtype}", "complex64 can be saved. Otherwise: " + MODEL_AND_MASKS
                )
            key = (tensor.data_ptr() or node.target, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            name, order = stored.setdefault(key, f"weight:{node.target}"), dimension_order(tensor)
            tensors[name] = tensor.permute(order)
            weights[node.target] = [name, order, str(tensor.device)]
    return weights, tensors


def dimension_order(tensor: Tensor) -> list[int]:
    """Dimensions from the outermost in memory to the innermost; as they are where no order makes it contiguous."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    stride = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -stride[d])
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


def _encode_node(node: fx.Node, number: Callable[[fx.Node], int]) -> Json:
    if node.op == "placeholder":
        return ["input", node.name, node.target]
    if node.op == "get_attr":
        return ["weight", node.name, node.target]
    if node.op == "output":
        return ["output", encode(tuple(node.args), number)]
    kwargs = {key: encode(value, number) for key, value in node.kwargs.items()}
    where = owner(node) if node.meta.get("nn_module_stack") else ""
    return ["call", node.name, _operator_name(node.target), [encode(a, number) for a in node.args], kwargs, where]


def _operator_name(target: Any) -> str:
    name = f"python::{_PYTHON_NAMES.get(target)}"
    if isinstance(target, OpOverload):
        name = target.name()
    try:
        _operator(name)
    except PackageError:
        raise cannot_save(
            f"the operator {name if isinstance(target, OpOverload) else target}",
            "ATen's operators are written that change nothing and cannot read past a tensor. save_aoti takes any; or "
            "save the model and its masks.",
        ) from None
    return name


def _operator(name: str) -> Callable[..., Any]:
    """The operator called `name`. Raises PackageError unless it is a known one without side effects."""
    found = _OPERATOR.fullmatch(name)
    if found is not None:
        space, base, overload = found.groups()
        if space == "python":
            target = None if overload else _PYTHON.get(base)
        else:
            base = _ZEROED.get(base, base)
            target = getattr(getattr(getattr(torch.ops, space), base, None), overload or "default", None)
        if target is not None and (space == "python" or _functional(target, space, base)):
            return target
    got = f"{name!r}, which this installation lacks or refuses" if len(name) < 100 else "a long name"
    raise PackageError("operator in a package", expected="functional ATen, or the operator of a format", got=got,
                       do=f"torch here is {torch.__version__}; the package says which one wrote it.")  # fmt: skip


def _functional(target: Any, space: str, base: str) -> bool:
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    if space == "fxsparse" or target in RULES:
        return space == "aten" or target in BY_OPERATOR
    return bool(_UNDERSCORED.fullmatch(base)) if base.startswith("_") else not _REFUSED.fullmatch(base)


def _root(weights: Json, tensors: Mapping[str, Tensor]) -> nn.Module:
    root = nn.Module()
    made: dict[tuple[str, ...], Tensor] = {}
    for target, (name, order, device) in weights.items():
        key = (name, str(order), device)
        if key not in made:
            back = sorted(range(len(order)), key=order.__getitem__)  # permute refuses what is no permutation
            made[key] = tensors[name].permute(order).permute(back).permute(back).to(_device(device))
        _register(root, target, made[key])
    return root


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise PackageError("package", expected=f"the device {name!r}, where its weights were", got="none here",
                           do="Load it on a machine that has one, or compile on the CPU and save that.")  # fmt: skip
    return device


def _register(root: nn.Module, target: str, tensor: Tensor) -> None:
    """Refuses names that would replace something of a module, or break out of the quotes torch.fx puts around them."""
    *path, leaf = target.split(".")
    if not target.isprintable() or set(target) & set("\"'\\") or any(hasattr(fx.GraphModule, p) for p in (*path, leaf)):
        raise unreadable(f"a weight called {target[:100]!r}")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = cast(nn.Module, module._modules[part])
    module.register_buffer(leaf, tensor)


def _decode_node(graph: fx.Graph, root: nn.Module, item: Json, nodes: list[fx.Node]) -> fx.Node:
    kind, *rest = item
    if kind == "output":
        (value,) = decode(rest[0], nodes)
        return cast(fx.Node, graph.output(value))
    if kind == "call":
        return _decode_call(graph, root, rest, nodes)
    name, target = rest
    _names([name])
    if kind == "input":
        _names([target])
        return graph.create_node("placeholder", target, name=name)
    if kind != "weight":
        raise ValueError(f"a node of kind {kind!r}")
    root.get_buffer(target)
    return graph.create_node("get_attr", target, name=name)


def _decode_call(graph: fx.Graph, root: nn.Module, item: Json, nodes: list[fx.Node]) -> fx.Node:
    name, operator_name, args, kwargs, where = item
    target = _operator(operator_name)
    arguments = decode({"tuple": args}, nodes)
    _names([name, *kwargs])
    if target in BY_OPERATOR:
        _check_arrays(BY_OPERATOR[cast(OpOverload, target)], root, arguments, kwargs)
    node = graph.create_node(
        "call_function", target, arguments, {key: decode(v, nodes) for key, v in kwargs.items()}, name
    )
    if where:
        node.meta["nn_module_stack"] = {where: (where, "")}
    return node


def _check_signature(nodes: list[fx.Node], info: fx.graph._PyTreeInfo) -> None:
    sides = info.in_spec.children()
    if info.in_spec.type is not tuple or [side.type for side in sides] != [tuple, dict]:
        raise ValueError("inputs that are not a tuple and a dict")
    _names(list(cast(Any, sides[1]).context))
    inputs = sum(node.op == "placeholder" for node in nodes)
    outputs = [len(cast(Any, node.args[0])) for node in nodes if node.op == "output"]
    if inputs != info.in_spec.num_leaves or [cast(Any, info.out_spec).num_leaves] != outputs:
        raise ValueError("another number of inputs or outputs than its signature has")


def _check_arrays(form: Any, root: nn.Module, arguments: tuple[Any, ...], kwargs: Json) -> None:
    """A kernel reads where its index arrays say: what packing guarantees is checked again."""
    if kwargs:
        raise ValueError("keywords where there are none")
    form.check_call([root.get_buffer(str(a.target)) if _is_weight(a) else a for a in arguments])


def _is_weight(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _names(names: list[Any]) -> list[str]:
    for name in names:
        if not isinstance(name, str) or not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
            raise unreadable(f"the name {str(name)[:100]!r}")
    return names


def unreadable(got: str) -> PackageError:
    """The error for a graph or anything in it that this module does not write."""
    return PackageError("graph of a package", expected="what SparseModule.save writes", got=got,
                        do="The file was changed: get it again from its maker.")  # fmt: skip
