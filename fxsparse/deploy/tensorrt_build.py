"""An ONNX model as a TensorRT engine: parsed, built strongly typed, kept in a cache.

Nothing here has run on a real TensorRT yet: the order of calls and every error are tested on a recording fake, the
names and types against `tensorrt_api`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsparse.deploy.onnx_model import OnnxModel, not_in_tensorrt, save
from fxsparse.deploy.tensorrt_api import BuilderConfig, Network, TensorRT
from fxsparse.errors import TargetError
from fxsparse.ir.decision import Decision
from fxsparse.ir.files import replacing
from fxsparse.kernels.build import cache_folder

log = logging.getLogger("fxsparse")

_MAGIC = b"fxsparse tensorrt plan 1\n"
_ELIGIBLE = re.compile(r"\(Sparsity\).*eligible for sparse math:(.*)", re.DOTALL)
_PICKED = re.compile(r"\(Sparsity\).*picked sparse implementation for layers:(.*)", re.DOTALL)
_SPARSE_DTYPES = ("FLOAT16", "BFLOAT16")  # of the weights of a strongly typed network; int8 comes by QuantizeLinear


@dataclass(frozen=True)
class Profile:
    """Batch sizes that an engine takes: the smallest, the one it is tuned for, the largest."""

    least: int
    best: int
    most: int


@dataclass(frozen=True)
class Gpu:
    """What a plan is bound to, besides TensorRT's version."""

    name: str
    capability: tuple[int, int]
    cuda: str

    @staticmethod
    def current() -> Gpu:
        """Raises RuntimeError, as torch does, where there is none."""
        device = torch.cuda.current_device()
        capability = torch.cuda.get_device_capability(device)
        return Gpu(torch.cuda.get_device_name(device), capability, str(torch.version.cuda))


@dataclass(frozen=True)
class Plan:
    """A serialized engine, which ONNX nodes the builder's log names for sparse math, and where it is kept."""

    data: bytes
    eligible: tuple[str, ...]
    picked: tuple[str, ...]
    path: Path


def logger(trt: TensorRT, said: list[tuple[str, str]]) -> Any:
    """A TensorRT logger that collects (severity, message), and passes warnings and errors on to ours."""

    def collect(self: object, severity: Any, message: str) -> None:
        name = str(getattr(severity, "name", severity))
        said.append((name, message))
        log.log(logging.WARNING if "ERROR" in name else logging.DEBUG, "tensorrt: %s", message)

    return type("Log", (trt.ILogger,), {"log": collect})()


def build(trt: TensorRT, model: OnnxModel, profile: Profile, *, gpu: Gpu, sparse: bool) -> Plan:
    """The plan of `model`: from the cache where it is there and whole, else built and put there.

    sparse  let the builder try 2:4 sparse kernels; it does where a weight qualifies
    Raises TargetError for an operator that the parser does not take, and when the build fails.
    """
    refuse_operators(model)
    sparse = sparse and bool(eligible_weights(model))
    with tempfile.TemporaryDirectory() as folder:
        files = save(model, Path(folder) / "model.onnx")
        path = cache_folder() / f"tensorrt-{_key(trt, files, profile, gpu, sparse)}.plan"
        plan = read_plan(path)
        if plan is None:
            data, said = _build(trt, files[0], model, profile, sparse, _timing_file(trt, gpu))
            plan = Plan(data, _layers(_ELIGIBLE, said, model), _layers(_PICKED, said, model), path)
            write_plan(plan)
        return plan


def refuse_operators(model: OnnxModel) -> None:
    """Raise TargetError for what the parser's table does not hold."""
    missing = not_in_tensorrt(model.proto)
    if missing:
        raise TargetError("target 'tensorrt'", expected="operators that its ONNX parser takes", got=", ".join(missing),
                          do="Replace them in the model, or compile for target='inductor'.")  # fmt: skip


def eligible_weights(model: OnnxModel) -> dict[str, str]:
    """ONNX nodes whose weight is 2:4 sparse and of a dtype with sparse kernels, and the weight's name."""
    return {node: weight for node, (weight, dtype) in two_four_nodes(model).items() if dtype in _SPARSE_DTYPES}


def two_four_nodes(model: OnnxModel) -> dict[str, tuple[str, str]]:
    """By ONNX node with a 2:4 weight: the weight's name and dtype."""
    import onnx

    dtypes = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.proto.graph.initializer}
    found = {}
    for node in model.proto.graph.node:
        weights = [name for name in node.input[1:2] if name in model.graph.two_four]
        if node.op_type in ("Conv", "Gemm") and weights:
            found[node.name] = (weights[0], dtypes.get(weights[0], ""))
    return found


def decisions(model: OnnxModel, plan: Plan) -> tuple[Decision, ...]:
    """What became of every 2:4 weight: picked, eligible and not picked, or not eligible and why."""
    picked, eligible = set(plan.picked), set(plan.eligible)
    found = []
    for node, (weight, dtype) in two_four_nodes(model).items():
        if dtype not in _SPARSE_DTYPES:
            why = f"its weight is {dtype}; sparse kernels take float16, bfloat16 and int8"
        elif node in picked:
            why = "the builder's log says that it picked a sparse implementation"
        elif node in eligible:
            why = "eligible, and the builder timed a dense kernel as faster"
        else:
            why = "the builder's log does not name it as eligible: its channels or its fusion may not suit"
        found.append(Decision("tensorrt", weight, "2:4 sparse math", why, node in picked))
    return tuple(found)


def _build(
    trt: TensorRT, path: Path, model: OnnxModel, profile: Profile, sparse: bool, timing: Path
) -> tuple[bytes, list[tuple[str, str]]]:
    """The plan, and what the builder said."""
    log.info("build TensorRT engine (batch %d to %d)", profile.least, profile.most)
    said: list[tuple[str, str]] = []
    collector = logger(trt, said)
    builder = trt.Builder(collector)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, path, collector)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if model.dynamic:
        shapes = builder.create_optimization_profile()
        for name, (least, best, most) in input_shapes(model, profile).items():
            shapes.set_shape(name, least, best, most)
        if config.add_optimization_profile(shapes) < 0:
            raise _failed("an optimization profile that fits the network", said)
    _load_timing(config, timing)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise _failed("an engine", said)
    _save_timing(config, timing)
    return bytes(data), said


def _parse(trt: TensorRT, network: Network, path: Path, collector: Any) -> None:
    parser = trt.OnnxParser(network, collector)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise TargetError("target 'tensorrt'", expected="a model that its ONNX parser takes",
                          got=errors or "a refusal without a reason",
                          do="Please report it, with TensorRT's version and the file of export_onnx.")  # fmt: skip


def input_shapes(model: OnnxModel, profile: Profile) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """By input, its shape at the three batch sizes."""
    found = {}
    for value in model.proto.graph.input:
        dims = [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
        least, best, most = ([b if d is None else d for d in dims] for b in (profile.least, profile.best, profile.most))
        found[value.name] = (least, best, most)
    return found


def _layers(pattern: re.Pattern[str], said: Sequence[tuple[str, str]], model: OnnxModel) -> tuple[str, ...]:
    """ONNX nodes named in the builder's list of (possibly fused) layers."""
    lists = [match.group(1) for _, message in said if (match := pattern.search(message))]
    words = {word for text in lists for word in re.split(r"[\s,+\[\](){}|]+", text)}
    return tuple(node.name for node in model.proto.graph.node if node.name in words)


def _load_timing(config: BuilderConfig, path: Path) -> None:
    """Start from the times of earlier builds. TensorRT itself refuses a cache of another version or GPU."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if not config.set_timing_cache(config.create_timing_cache(data), False) and data:
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timing(config: BuilderConfig, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        with replacing(path) as name:
            name.write_bytes(bytes(cache.serialize()))


def _timing_file(trt: TensorRT, gpu: Gpu) -> Path:
    digest = hashlib.sha256(repr((trt.__version__, gpu)).encode()).hexdigest()[:16]
    return cache_folder() / f"tensorrt-{digest}.timing"


def _key(trt: TensorRT, files: Sequence[Path], profile: Profile, gpu: Gpu, sparse: bool) -> str:
    """Everything a plan depends on: the model with its weights, versions, GPU, shapes and flags."""
    digest = hashlib.sha256(repr((trt.__version__, gpu, profile, sparse, _own_version())).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _own_version() -> str:
    try:
        return importlib.metadata.version("fxsparse")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_plan(plan: Plan) -> None:
    """Magic, a line of JSON with the plan's own digest, the plan; whole or not at all."""
    digest = hashlib.sha256(plan.data).hexdigest()
    head = {"sha256": digest, "eligible": list(plan.eligible), "picked": list(plan.picked)}
    with replacing(plan.path) as name:
        name.write_bytes(_MAGIC + json.dumps(head).encode() + b"\n" + plan.data)


def read_plan(path: Path) -> Plan | None:
    """The plan; None when there is none, or one that was damaged."""
    try:
        raw = path.read_bytes()
        head, data = raw[len(_MAGIC) :].split(b"\n", 1)
        known: Mapping[str, Any] = json.loads(head)
        if not raw.startswith(_MAGIC) or known["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("damaged")
        return Plan(data, tuple(known["eligible"]), tuple(known["picked"]), path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s is damaged and will be built again", path)
        return None


def _failed(what: str, said: Sequence[tuple[str, str]]) -> TargetError:
    errors = [message for severity, message in said if "ERROR" in severity]
    return TargetError(
        "target 'tensorrt'", expected=what, got="; ".join(errors[-3:]) or "none, and no error in its log",
        do="Free GPU memory if it names that; else please report it, with TensorRT's version.",
    )  # fmt: skip
