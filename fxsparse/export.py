"""A compiled model as a file for other runtimes."""

from __future__ import annotations

import logging
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.backend.target import COMPILING
from fxsparse.backend.tensorrt import tensorrt
from fxsparse.deploy.onnx_model import OnnxModel, not_in_tensorrt, require, save, to_onnx
from fxsparse.deploy.onnx_runtime import OnnxSession
from fxsparse.deploy.tensorrt_build import Profile, decisions, eligible_weights, input_shapes, refuse_operators
from fxsparse.deploy.tensorrt_runtime import open_engine
from fxsparse.errors import InputError
from fxsparse.ir.decision import Decision
from fxsparse.ir.files import whole_file, writable, writing
from fxsparse.ir.graph import flat
from fxsparse.ir.inputs import batch_size
from fxsparse.ir.symbols import concrete
from fxsparse.module import SparseModule
from fxsparse.verify import check, probed

log = logging.getLogger("fxsparse")
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class OnnxFile:
    """What `export_onnx` wrote. `str()` says it in a few lines.

    files            the model, and its weights when they are in a second file
    operators        how often each is there; all of the domain ai.onnx
    not_in_tensorrt  those that TensorRT's parser does not take, by its published table
    two_four         weights that are 2:4 sparse
    verified         by batch size, how far ONNX Runtime was from the graph in float64; empty with verify=False
    unstructured     how many weights that are stored so here are dense there, zeros and all
    """

    files: tuple[Path, ...]
    opset: int
    operators: Mapping[str, int]
    not_in_tensorrt: tuple[str, ...]
    two_four: tuple[str, ...]
    verified: Mapping[int, str] = field(default_factory=dict)
    unstructured: int = 0

    def __str__(self) -> str:
        count = ", ".join(f"{n} {name}" for name, n in Counter(self.operators).most_common())
        return "\n".join([
            f"wrote {', '.join(map(str, self.files))}",
            f"operators (opset {self.opset}): {count}",
            f"not in TensorRT's table: {', '.join(self.not_in_tensorrt) or 'none'}",
            f"2:4 sparse weights: {', '.join(self.two_four) or 'none'}",
            *([_dense_there(self.unstructured)] if self.unstructured else []),
            *(f"ONNX Runtime, batch {batch}: {said}" for batch, said in self.verified.items()),
        ])  # fmt: skip


def _dense_there(n: int) -> str:
    return f"{n} unstructured weight{'s are' if n > 1 else ' is'} written dense (zeros stored)"


def export_onnx(
    sparse: SparseModule,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    verify: bool = True,
) -> OnnxFile:
    """Write a compiled model as an ONNX file in standard operators (opset 20, with bfloat16 22), whole or not at all.

    sparse         what `compile` returned, for any target. "onnx" chooses formats by their time in ONNX Runtime
    path           of the model; missing folders are made
    external_data  weights in a second file, `path` + ".data"; None: above 1 GiB
    verify         compare ONNX Runtime with the graph in float64, at several batch sizes where the batch is free
    Shuffled blocks become gathers, grouped convolutions and batched products; linear layers with 2:4 weights Gemm;
    unstructured weights dense ones, which the result counts.
    Raises TargetError without onnx and onnxscript (and onnxruntime to verify), for what ONNX cannot express, and to
    verify for what ONNX Runtime's CPU kernels do not compute (bfloat16);
    VerificationError when the file computes something else; InputError when `sparse` is not compiled, or for `path`.
    """
    gm = compiled_graph(sparse)
    writable(path, "model.onnx")
    require("onnx", "onnxscript", *["onnxruntime"] * verify, what="export_onnx")
    with COMPILING:
        model = to_onnx(gm)
    return _write(sparse, model, path, external_data, verify)


def _write(
    sparse: SparseModule, model: OnnxModel, path: str | os.PathLike[str], external_data: bool | None, verify: bool
) -> OnnxFile:
    verified = verify_onnx(sparse.graph_module, model, pytree.tree_leaves(sparse.example)) if verify else {}
    with writing(path):
        files = save(model, path, external_data=external_data)
    foreign = not_in_tensorrt(model.proto)
    return OnnxFile(files, model.opset, model.operators, foreign, model.graph.two_four, verified,
                    model.graph.unstructured)  # fmt: skip


def compiled_graph(sparse: object) -> fx.GraphModule:
    """Its graph. Raises InputError for what `compile` did not return."""
    if not isinstance(sparse, SparseModule):
        raise InputError("model to export", expected="what fxsparse.compile returned", got=type(sparse).__name__,
                         do="fxsparse.compile(model, masks, target='onnx', example_inputs=(x,))")  # fmt: skip
    return sparse.graph_module


def verify_onnx(gm: fx.GraphModule, model: OnnxModel, example: Sequence[object]) -> dict[int, str]:
    """What ONNX Runtime gives at several batch sizes, against the graph in float64. Raises VerificationError."""
    session, found, plain = OnnxSession(model), {}, flat(gm)
    own = batch_size(example)
    for batch in dict.fromkeys((own, *BATCHES)) if model.dynamic else (own,):
        shapes = [concrete(node, batch) for node in gm.graph.find_nodes(op="placeholder")]
        ref = probed(plain, example, shapes if model.dynamic else None, seed=batch)
        exact = [y.cpu() if isinstance(y, Tensor) else y for y in ref.exact]
        found[batch] = check(session(*ref.inputs), replace(ref, exact=tuple(exact)), f"ONNX file at batch {batch}",
                             "The graph was right before it was exported: please report it.")  # fmt: skip
        log.info("ONNX Runtime, batch %d: %s", batch, found[batch])
    return found


@dataclass(frozen=True)
class TensorRtFile:
    """What `export_tensorrt` wrote. `str()` says it, with the trtexec line.

    files      the engine, or the ONNX model it is to be built from
    command    the trtexec line that builds such an engine from an ONNX file
    decisions  what became of every 2:4 weight; empty without an engine
    onnx       what was written instead of an engine; None with one
    """

    files: tuple[Path, ...]
    command: str
    decisions: tuple[Decision, ...] = ()
    onnx: OnnxFile | None = None

    def __str__(self) -> str:
        if self.onnx is None:
            return "\n".join([f"wrote {', '.join(map(str, self.files))}", *map(str, self.decisions)])
        return f"{self.onnx}\nto build the engine where TensorRT is:\n{self.command}"


def export_tensorrt(
    sparse: SparseModule,
    path: str | os.PathLike[str],
    *,
    engine: bool = True,
    batches: tuple[int, int, int] | None = None,
    verify: bool = True,
) -> TensorRtFile:
    """Write a compiled model as a TensorRT engine; or, with engine=False, as the ONNX file to build it from elsewhere.

    sparse   what `compile` returned, on the GPU for an engine. For the ONNX file any target will do
    path     of the engine or of the ONNX file
    batches  smallest, best and largest batch; None: 1 and the example's. Without effect on a fixed batch
    verify   without an engine: compare ONNX Runtime with the graph. An engine is compared by compile(target="tensorrt")
    Raises TargetError without TensorRT 10.12 or a GPU (not with engine=False), for operators outside of its parser's
    table, and when it fails; all that `export_onnx` raises.
    Neither the engine nor the trtexec line has been tried on a real TensorRT yet.
    """
    gm, own = compiled_graph(sparse), batch_size(pytree.tree_leaves(sparse.example))
    profile = Profile(1, own, own) if batches is None else _profile(batches)
    writable(path, "model.onnx")
    trt = tensorrt() if engine else None
    require("onnx", "onnxscript", *["onnxruntime"] * (verify and not engine), what="export_tensorrt")
    with COMPILING:
        model = to_onnx(gm)
    refuse_operators(model)
    if trt is None:
        file = _write(sparse, model, path, None, verify)
        return TensorRtFile(file.files, trtexec(model, profile, Path(path)), onnx=file)
    plan, _ = open_engine(trt, model, profile, sparse=True)
    with whole_file(path) as name:
        name.write_bytes(plan.data)
    return TensorRtFile((Path(path),), trtexec(model, profile, Path("model.onnx")), decisions(model, plan))


def _profile(batches: object) -> Profile:
    """Raises InputError for what is not three ascending batch sizes."""
    match batches:
        case (int(least), int(best), int(most)) if 1 <= least <= best <= most:
            return Profile(least, best, most)
    raise InputError(f"batches={batches!r}", expected="three whole numbers, smallest <= best <= largest, from 1 on",
                     got="others", do="For example: batches=(1, 8, 64).")  # fmt: skip


def trtexec(model: OnnxModel, profile: Profile, path: Path) -> str:
    """The line that builds the engine of `model` at `path`, as `compile` would; for trtexec 10.12 to 11."""
    shapes = input_shapes(model, profile)
    parts = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.plan')}", "--stronglyTyped"]
    parts += ["--sparsity=enable"] * bool(eligible_weights(model))
    for i, which in enumerate(("min", "opt", "max")) if model.dynamic else ():
        sizes = ",".join(f"{name}:{'x'.join(map(str, three[i]))}" for name, three in shapes.items())
        parts.append(f"--{which}Shapes={sizes}")
    parts += [f"--timingCacheFile={path.with_suffix('.timing')}", "--profilingVerbosity=detailed"]
    return shlex.join(parts)
