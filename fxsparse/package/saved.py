"""Everything of a compiled model that a package keeps, and the package as such."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxsparse.errors import InputError, PackageError
from fxsparse.ir.inputs import LAYOUTS
from fxsparse.ir.masks import Masks
from fxsparse.package import container
from fxsparse.package.graph import decode_graph, dimension_order, encode_graph, unreadable
from fxsparse.package.values import Json, decode, encode
from fxsparse.report import Report

_MASK, _NATIVE = "mask:", "native code"


@dataclass
class Saved:
    """A compiled model as data.

    gm             the graph that was lowered, with the user's own signature
    example        flattened inputs; after reading, zeros of the same shapes
    target         name of the target the user chose; lowered_by may be another one, where a dense build won
    layout         name of what is done to the inputs first (fxsparse.ir.inputs)
    signature      of the model's forward: names for inputs, and defaults that are plain values
    native         an AOTInductor package for the example's shapes, None without; never run unless the user asks for it
    native_for     the machine that code was made for
    """

    gm: fx.GraphModule
    example: Sequence[Any]
    target: str
    lowered_by: str
    layout: str
    dynamic_batch: bool
    report: Report
    signature: inspect.Signature | None = None
    native: bytes | None = None
    native_for: Mapping[str, str] | None = None


def write(saved: Saved, path: str | os.PathLike[str], writer: str) -> None:
    """Write a package, whole or not at all. Raises InputError for a graph that is not data."""
    graph, tensors = encode_graph(saved.gm)
    masks: Mapping[str, Tensor] = saved.report.masks or {}
    content = {
        "graph": graph,
        "example": [_encode_input(x) for x in saved.example],
        "signature": _encode_signature(saved.signature),
        "report": saved.report.to_dict(),
        "masks": {name: list(mask.shape) for name, mask in masks.items()},
        **{name: getattr(saved, name) for name in _PLAIN},
    }
    tensors |= {_MASK + name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in masks.items()}
    if saved.native is not None:
        tensors[_NATIVE] = torch.frombuffer(bytearray(saved.native), dtype=torch.uint8)
    container.write(path, content, tensors, writer)


_PLAIN = ("target", "lowered_by", "layout", "dynamic_batch", "native_for")


def read(path: str | os.PathLike[str], *, native: bool) -> Saved:
    """Read a package; its native code only when asked to, and even then it is bytes. Raises PackageError."""
    content, tensors, _ = container.read(path)
    code = tensors.pop(_NATIVE, None)
    try:
        gm = decode_graph(content["graph"], tensors)
        example = [_decode_input(x) for x in content["example"]]
        report = Report.from_dict(content["report"], _masks(content["masks"], tensors))
        plain = {name: content[name] for name in _PLAIN}
        LAYOUTS[plain["layout"]]
        signature = _decode_signature(content.get("signature"))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise unreadable(f"{type(error).__name__}: {str(error)[:200]}") from None
    if len(example) != sum(node.op == "placeholder" for node in gm.graph.nodes):
        raise unreadable("another number of example inputs than the graph has")
    return Saved(gm, example, report=report, signature=signature, native=_bytes(code) if native else None, **plain)


def _bytes(code: Tensor | None) -> bytes | None:
    return None if code is None else code.numpy().tobytes()


def _encode_input(x: Any) -> Json:
    if not isinstance(x, Tensor):
        return {"value": encode(x, lambda node: 0)}
    kind = {"shape": list(x.shape), "dtype": encode(x.dtype, lambda node: 0), "device": str(x.device)}
    return {**kind, "order": dimension_order(x)}


def _decode_input(x: Json) -> Any:
    if "value" in x:
        return decode(x["value"], [])
    order = x["order"]
    back = sorted(range(len(order)), key=order.__getitem__)
    stored = torch.zeros([x["shape"][d] for d in order], dtype=decode(x["dtype"], []), device=x["device"])
    return stored.permute(back)


def _encode_signature(signature: inspect.Signature | None) -> Json:
    """[name, kind] of every parameter, and its default where there is one: [value], [] for what is no plain value."""
    if signature is None:
        return None
    return [[p.name, p.kind.name, *_encode_default(p.default)] for p in signature.parameters.values()]


def _encode_default(value: Any) -> list[Json]:
    if value is inspect.Parameter.empty:
        return []
    try:
        return [[encode(value, lambda node: 0)]]
    except InputError:
        return [[]]


def _decode_signature(parameters: Json) -> inspect.Signature | None:
    """A default that was no plain value is an object that equals nothing."""
    if parameters is None:
        return None
    found = []
    for name, kind, *default in parameters:
        value = (decode(default[0][0], []) if default[0] else object()) if default else inspect.Parameter.empty
        found.append(inspect.Parameter(name, getattr(inspect.Parameter, kind), default=value))
    return inspect.Signature(found)


def _masks(shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> Masks | None:
    masks = {}
    for name, shape in shapes.items():
        bits, size = tensors[_MASK + name].numpy(), int(np.prod(shape))
        if size < 0 or len(bits) != -(-size // 8):
            raise PackageError("mask in a package", expected="one bit per weight", got=f"{len(bits)} bytes for {shape}",
                               do="The file was changed: get it again from its maker.")  # fmt: skip
        masks[name] = torch.from_numpy(np.unpackbits(bits, count=size).astype(bool)).view(*shape)
    return Masks(masks) if masks else None
