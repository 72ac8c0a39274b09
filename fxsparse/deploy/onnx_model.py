"""A graph as an ONNX model: torch.onnx.export does the work; here it is told what to do, and its result is checked."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.deploy.standard import StandardGraph, standard
from fxsparse.errors import TargetError, first_line
from fxsparse.ir.files import replacing
from fxsparse.ir.inputs import CUDNN_BATCH

OPSET = 20  # every TensorRT from 10.0 on reads it
BFLOAT16_OPSET = 22  # convolution and pooling have no bfloat16 before
SINGLE_FILE_BYTES = 1 << 30  # protobuf ends at 2 GiB, and readers copy
_TABLE_DTYPE = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
_LEFT_OUT = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")  # paths of this machine; text that says it again


@dataclass(frozen=True)
class OnnxModel:
    """A model (`onnx.ModelProto`) and how its inputs and outputs belong to the flattened ones of the graph."""

    proto: Any
    graph: StandardGraph
    dynamic: bool

    @property
    def operators(self) -> Counter[str]:
        return Counter(node.op_type for node in self.proto.graph.node)

    @property
    def opset(self) -> int:
        return int(next(o.version for o in self.proto.opset_import if o.domain == ""))

    @property
    def bytes(self) -> int:
        return int(self.proto.ByteSize())


def require(*packages: str, what: str) -> None:
    """Raise TargetError unless all of these can be imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise TargetError(what, expected=f"the packages {', '.join(packages)}", got=f"no {', '.join(missing)}",
                          do="pip install 'fxsparse[onnx]'")  # fmt: skip


def to_onnx(gm: fx.GraphModule) -> OnnxModel:
    """`gm` in opset 20 (22 with bfloat16), its symbolic dimension called "batch". Raises TargetError for what has none.

    Inputs are called as the model's own, outputs "output" or "output_0", "output_1" ...
    """
    _refuse_complex(gm)
    graph = standard(gm)
    examples, shapes = _examples(graph.gm)
    names = (
        ["output"] if len(graph.outputs) == 1 else [f"output_{i}" for i, (ours, _) in enumerate(graph.outputs) if ours]
    )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own, about itself
            program = torch.onnx.export(
                graph.gm, examples, dynamo=True, opset_version=_opset(graph.gm), dynamic_shapes=shapes,
                output_names=names, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - whatever the exporter raises
        raise _refused(error) from None
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    check_proto(proto)
    return OnnxModel(proto, graph, shapes is not None)


def _refuse_complex(gm: fx.GraphModule) -> None:
    """The exporter writes pairs of real numbers in their place, also for what goes in and comes out."""
    (output,) = gm.graph.find_nodes(op="output")
    for node in [*gm.graph.find_nodes(op="placeholder"), *output.all_input_nodes]:
        val = node.meta.get("val")
        if isinstance(val, Tensor) and val.is_complex():
            raise TargetError("ONNX model", expected="real inputs and outputs", got=f"{node.name} of {val.dtype}",
                              do="Take torch.view_as_real of it inside of the model.")  # fmt: skip


def _opset(gm: fx.GraphModule) -> int:
    vals = [n.meta.get("val") for n in gm.graph.nodes]
    half = any(isinstance(v, Tensor) and v.dtype == torch.bfloat16 for v in vals)
    return BFLOAT16_OPSET if half else OPSET


def check_proto(proto: Any) -> None:
    """onnx.checker, and standard operators only. Raises TargetError."""
    import onnx

    foreign = sorted({f"{n.domain}::{n.op_type}" for n in proto.graph.node if n.domain not in ("", "ai.onnx")})
    foreign += [f"function {f.name}" for f in proto.functions]
    try:
        onnx.checker.check_model(proto, full_check=proto.ByteSize() < SINGLE_FILE_BYTES)
    except Exception as error:  # noqa: BLE001 - of three modules
        foreign.append(first_line(error))
    if foreign:
        raise TargetError("ONNX model", expected="standard operators that onnx.checker accepts",
                          got=", ".join(foreign), do="Please report it, with the model.")  # fmt: skip


def save(model: OnnxModel, path: str | os.PathLike[str], *, external_data: bool | None = None) -> tuple[Path, ...]:
    """Write `path`, and with external data `path` + ".data" before it; whole or not at all. Returns what was written.

    external_data  weights in a second file; None: above 1 GiB
    An OSError of the system passes through.
    """
    import onnx

    path = Path(path)
    external = model.bytes >= SINGLE_FILE_BYTES if external_data is None else external_data
    if not external:
        with replacing(path) as name:
            onnx.save_model(model.proto, name)
        return (path,)
    data = path.with_name(path.name + ".data")
    proto = type(model.proto)()
    proto.CopyFrom(model.proto)  # saving moves the weights out of it
    with replacing(path) as name, replacing(data) as weights:  # left in reverse: the data is there first
        onnx.save_model(proto, name, save_as_external_data=True, location=weights.name, size_threshold=1024)
        _rename_data(proto, data.name)
        onnx.save_model(proto, name)
    return path, data


def _rename_data(proto: Any, location: str) -> None:
    """Tensors point at the name that the data file will have."""
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def not_in_tensorrt(proto: Any) -> tuple[str, ...]:
    """What the table of TensorRT's ONNX parser does not hold: "Bernoulli", or "Erf of DOUBLE"."""
    types, table, missing = _types(proto), tensorrt_operators(), set()
    for node in proto.graph.node:
        names = [name for name in (*node.input[:1], *node.output[:1]) if name in types]
        dtype = _TABLE_DTYPE.get(types[names[0]], types[names[0]]) if names else None
        if node.op_type not in table:
            missing.add(node.op_type)
        elif dtype is not None and dtype not in table[node.op_type]:
            missing.add(f"{node.op_type} of {dtype}")
    return tuple(sorted(missing))


@functools.cache
def tensorrt_operators() -> dict[str, tuple[str, ...]]:
    """Dtypes by operator, of those that the parser accepts. Source: docs/operators.md of onnx-tensorrt, Apache-2.0."""
    text = resources.files("fxsparse.deploy").joinpath("tensorrt_operators.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return {row[0]: tuple(row[1].split(",")) for row in rows}


def _types(proto: Any) -> dict[str, str]:
    import onnx

    infos = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    found = {v.name: v.type.tensor_type.elem_type for v in infos}
    found |= {t.name: t.data_type for t in proto.graph.initializer}
    return {name: onnx.TensorProto.DataType.Name(kind) for name, kind in found.items()}


def _examples(gm: fx.GraphModule) -> tuple[tuple[Tensor, ...], Any]:
    """Inputs to trace with and their dynamic dimensions, from the fake shapes; batch 2, as 0 and 1 are special."""
    vals = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    batch = torch.export.Dim("batch", min=1, max=CUDNN_BATCH if any(v.is_cuda for v in vals) else None)
    free = [[d for d, size in enumerate(v.shape) if not isinstance(size, int)] for v in vals]
    examples = tuple(
        torch.zeros([size if isinstance(size, int) else 2 for size in v.shape], dtype=v.dtype, device=v.device)
        for v in vals
    )
    shapes = tuple(dict.fromkeys(dims, batch) for dims in free)
    return examples, shapes if any(free) else None


def _strip(proto: Any) -> None:
    """Leave out what names this machine's files: the same model gives the same bytes anywhere."""
    holders = [*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, proto.graph, proto]
    for holder in holders:
        kept = [entry for entry in holder.metadata_props if entry.key not in _LEFT_OUT]
        if len(kept) != len(holder.metadata_props):
            copies = [(entry.key, entry.value) for entry in kept]
            del holder.metadata_props[:]
            for key, value in copies:
                holder.metadata_props.add(key=key, value=value)


def _refused(error: Exception) -> TargetError:
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    return TargetError("ONNX model", expected="operators that torch.onnx can translate",
                       got=first_line(cause),
                       do="Replace the operator it names, or compile for target='inductor'.")  # fmt: skip
