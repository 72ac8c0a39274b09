"""What may stand in a graph's arguments and signature, as JSON and back. Nothing else is written, nothing else is read.

None, bool, int, finite floats, strings and lists are themselves. The rest is an object with one key:

    {"node": 3}  {"tuple": [...]}  {"slice": [a, b, c]}  {"float": "inf"}  {"complex": [re, im]}
    {"torch": "float32"}  {"device": "cpu"}

A structure of inputs or outputs is null for a leaf and {"tuple" | "list" | "dict" | "odict" | "named": [...]} else.
torch's own `treespec_loads` is not used: it imports modules that the file names.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxsparse.errors import InputError, PackageError

Json = Any
_PLAIN = "Take and return tensors in tuples, lists and dicts with names or numbers as keys."
MODEL_AND_MASKS = "Save the model and its masks, and compile them where they are used."
_TORCH = {
    str(v).removeprefix("torch."): v
    for v in vars(torch).values()
    if isinstance(v, (torch.dtype, torch.layout, torch.memory_format))
}


def encode(value: Any, number: Callable[[fx.Node], int]) -> Json:
    """`value` of a node's argument; `number` gives a node's place in the graph. Raises InputError for another kind."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [encode(v, number) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v, number) for v in value]}
    if isinstance(value, slice):
        return {"slice": [encode(v, number) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, fx.Node):
        return {"node": number(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    raise cannot_save(f"an argument of type {type(value).__name__}", MODEL_AND_MASKS)


def decode(value: Json, nodes: Sequence[fx.Node]) -> Any:
    """What `encode` was given; `nodes` are those before. Raises ValueError, KeyError or TypeError for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    ((kind, content),) = value.items()
    return _DECODE[kind](content, nodes)


def _node(number: Json, nodes: Sequence[fx.Node]) -> fx.Node:
    if not isinstance(number, int) or not 0 <= number < len(nodes):
        raise ValueError(f"a node that is not there, {number!r}")
    return nodes[number]


_DECODE: dict[str, Callable[[Json, Sequence[fx.Node]], Any]] = {
    "node": _node,
    "tuple": lambda content, nodes: tuple(decode(v, nodes) for v in content),
    "slice": lambda content, nodes: slice(*(decode(v, nodes) for v in content)),
    "float": lambda content, nodes: float(content),
    "complex": lambda content, nodes: complex(*content),
    "torch": lambda content, nodes: _TORCH[content],
    "device": lambda content, nodes: torch.device(content),
}


def encode_spec(spec: pytree.TreeSpec) -> Json:
    """A structure of inputs or outputs. Raises InputError for one that is not made of plain containers."""
    if spec.is_leaf():
        return None
    children = [encode_spec(child) for child in spec.children()]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    if spec.type in (dict, OrderedDict):
        return {"dict" if spec.type is dict else "odict": [_keys(spec.context), children]}
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    if known is None or known.to_dumpable_context is not None or spec.type.__module__ in ("builtins", "collections"):
        raise cannot_save(f"inputs or outputs in a {getattr(spec.type, '__name__', spec.type)}", _PLAIN)
    return {"named": [known.serialized_type_name, _keys(spec.context), children]}


def _keys(context: Any) -> list[str | int]:
    if not isinstance(context, list) or not all(isinstance(key, (str, int)) for key in context):
        raise cannot_save(f"a container with the keys {context!r}", _PLAIN)
    return context


def decode_spec(value: Json) -> pytree.TreeSpec:
    """What `encode_spec` was given. Raises PackageError for a type that was not imported; none is imported here."""
    if value is None:
        return pytree.tree_structure(0)
    ((kind, content),) = value.items()
    if kind in ("tuple", "list"):
        return pytree.TreeSpec({"tuple": tuple, "list": list}[kind], None, [decode_spec(v) for v in content])
    *name, keys, children = content
    type_ = {"dict": dict, "odict": OrderedDict, "named": None}[kind] or _registered(*name)
    if len(_keys(keys)) != len(children):
        raise ValueError("a container with more keys than values")
    return pytree.TreeSpec(type_, keys, [decode_spec(v) for v in children])


def _registered(name: str) -> Any:
    found = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    if found is None or pytree.SUPPORTED_SERIALIZED_TYPES[found].from_dumpable_context is not None:
        raise PackageError(f"structure {name!r} of a package", expected="a type that torch's pytree knows",
                           got="one that is not imported here",
                           do="Import the package that defines it first; load imports nothing by name.")  # fmt: skip
    return found


def cannot_save(what: str, do: str) -> InputError:
    """The error for a graph that cannot be written down."""
    return InputError(
        "save of a SparseModule", expected="operators and values that can be written as data", got=what, do=do
    )
