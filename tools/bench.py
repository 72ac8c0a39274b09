"""The numbers. One case is one process and one JSON row:

    python -m tools.bench --model resnet50 --recipe refill_like --sparsity 0.5 --batch 1 --threads 2 --out rows.jsonl
    python -m tools.bench --suite spine --out tools/rows/NAME.jsonl     # every case of a suite, one after the other
    python -m tools.bench --matrix                                     # never slower? the rows of the suite "matrix"
    python -m tools.bench --documents                                  # the documents' tables of the rows in tools/rows

A row holds the median and spread of every dense build of the same masked model (eager and Inductor with freezing,
contiguous and channels_last, ONNX Runtime where it is installed), of a natively slim model of the same widths, and of
ours, all timed in turns in one process; the machine, versions, commit, date and command. Losing rows are rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxsparse
from fxsparse.backend import find_target
from fxsparse.contest import dense_builds
from fxsparse.ir.capture import capture
from fxsparse.machine import cpu_name
from fxsparse.measure import AGAIN, Runs, play_off, settled
from fxsparse.passes import Context, canonicalize, choose_formats, run
from tools.block_recipes import BLOCK_RECIPES
from tools.cases import SUITES
from tools.entrances import through_torch_compile
from tools.recipes import RECIPES
from tools.slim import native_slim
from tools.subjects import OWN_MODELS, Inputs, build_model, example_inputs, make_masks, without_grad
from tools.tables import CASE, ROOT, by_machine, commit, load_rows, matrix, rows_in, write_documents


def main(argv: Sequence[str] | None = None) -> int:
    """One case, a suite, or the documents' tables."""
    arguments = _parser().parse_args(argv)
    if arguments.documents:
        return write_documents()
    if arguments.matrix:
        print("\n\n".join(map(matrix, by_machine(load_rows("matrix")))))
        return 0
    if arguments.suite:
        return run_suite(arguments)
    row = run_case(arguments)
    _append(arguments.out, row)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="Measured rows; see the module's text.")
    parser.add_argument(
        "--model", default="resnet18", help=f"a name in models, torchvision.models or of {', '.join(OWN_MODELS)}"
    )
    parser.add_argument(
        "--recipe",
        default="refill_coupled",
        help=f"{', '.join([*RECIPES, *BLOCK_RECIPES])}, heads_and_neurons or refill_coupled",
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=32, help="rows of a group, for shuffled blocks")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=0, help="image side; 0: 32 for CIFAR models, else 224")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--target", default="inductor")
    parser.add_argument("--seconds", type=float, default=12.0, help="timing budget of one case")
    parser.add_argument("--no-slim", dest="slim", action="store_false", help="build no natively slim model")
    parser.add_argument(
        "--entrance",
        action="store_true",
        help="also time torch.compile(model, backend='fxsparse') and TorchDynamo alone",
    )
    parser.add_argument("--suite", choices=list(SUITES), help="run every case of a suite that OUT lacks")
    parser.add_argument("--out", type=Path, help="append rows here (default: print only)")
    parser.add_argument("--matrix", action="store_true", help="print the committed rows of the suite matrix")
    parser.add_argument(
        "--documents", action="store_true", help="write the tables of README.md and docs/benchmarks.md from tools/rows"
    )
    return parser


def run_suite(arguments: argparse.Namespace) -> int:
    """Each case in a process of its own: threads and caches are its own too. What the file has is not run again."""
    failed = 0
    had = rows_in(arguments.out) if arguments.out and arguments.out.exists() else []
    given = {"dtype": arguments.dtype} | ({"side": arguments.side} if arguments.side else {})
    wanted = [given | case | {"target": arguments.target} for case in SUITES[arguments.suite]]
    cases = [case for case in wanted if not any(case.items() <= row.items() for row in had)]
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case}", file=sys.stderr, flush=True)
        flags = [part for key, value in case.items() for part in (f"--{key}", str(value))]
        flags += ["--device", arguments.device, "--seconds", str(arguments.seconds)]
        flags += ["--out", str(arguments.out)] if arguments.out else []
        flags += ["--no-slim"] if arguments.suite == "matrix" or not arguments.slim else []
        failed += subprocess.run([sys.executable, "-m", "tools.bench", *flags], cwd=ROOT, check=False).returncode != 0
    return int(failed > 0)


def run_case(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile, build the rivals, time all of them in turns."""
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = build_model(arguments.model).to(arguments.device, dtype)
    masks = fxsparse.Masks(make_masks(arguments.recipe, model, arguments.sparsity, arguments.rows))
    inputs = tuple(
        x.to(arguments.device, dtype if x.is_floating_point() else None) for x in example_inputs(model, arguments)
    )
    with _Stages() as stages:
        fast = fxsparse.compile(model, masks, arguments.target, example_inputs=inputs)
    ours: dict[str, Callable[[], object]] = {"fxsparse": lambda: fast(*inputs)}
    if arguments.entrance:
        ours |= through_torch_compile(model, masks, inputs, arguments.target, fast)
    rivals = _dense(model, masks, inputs) | _onnxruntime(model, masks, inputs)
    with _Stages() as slim_stages:
        if arguments.slim and (arguments.recipe in RECIPES or arguments.recipe == "refill_coupled"):
            ours |= _slim(model, fast.report, inputs, arguments.target)
    runs = play_off(ours, rivals, arguments.seconds, bounds=AGAIN)  # many rounds: they may take half a millisecond
    longer = settled(runs, runs.fastest(list(rivals)), "fxsparse", {**ours, **rivals})
    return _row(arguments, fast.report, longer, runs, {**stages.seconds, "slim": sum(slim_stages.seconds.values())})


def _dense(model: nn.Module, masks: fxsparse.Masks, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """PyTorch's dense builds, whatever the target: what any of them has to beat."""
    target = find_target("inductor" if inputs[0].is_cuda else "inductor_cpp")
    builds = dense_builds(_captured(model, masks, inputs), inputs, target)
    return {f"dense: {b.name}": without_grad(b.run, b.prepare(inputs)) for b in builds}


def _captured(model: nn.Module, masks: fxsparse.Masks, inputs: Inputs) -> torch.fx.GraphModule:
    gm = capture(model, inputs, masks, dynamic_batch=False)
    run(gm, [canonicalize], Context())
    return gm


def _slim(model: nn.Module, report: fxsparse.Report, inputs: Inputs, target: str) -> dict[str, Callable[[], object]]:
    try:
        slim = _captured(native_slim(model, report), fxsparse.Masks(), inputs)
    except fxsparse.FxSparseError as error:  # widths that a plain module cannot have
        print(f"no natively slim model: {error}", file=sys.stderr)
        return {}
    builds, runners = dense_builds(slim, inputs, find_target(target)), find_target(target).runners or (target,)
    return {f"slim: {b.name}": without_grad(b.run, b.prepare(inputs)) for b in builds if b.target.name in runners}


def _onnxruntime(model: nn.Module, masks: fxsparse.Masks, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The masked model in ONNX Runtime, on a CPU in float32, when it is installed."""
    if any(x.device.type != "cpu" or x.dtype not in (torch.float32, torch.int64) for x in inputs):
        return {}
    try:
        target = find_target("onnx")
    except fxsparse.TargetError:
        return {}
    run = target.lower_dense(_captured(model, masks, inputs), inputs)
    return {"dense: onnxruntime": without_grad(run, inputs)}


class _Stages(logging.Handler):
    """Seconds between the messages of the logger "fxsparse": how long each step took."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: dict[str, float] = {}
        self.current = ""
        self.start = time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        self._close()
        self.current = record.getMessage()

    def _close(self) -> None:
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = round(self.seconds.get(self.current, 0.0) + now - self.start, 2)
        self.start = now

    def __enter__(self) -> _Stages:
        logger = logging.getLogger("fxsparse")
        logger.addHandler(self)
        self.before = logger.level
        logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        logger = logging.getLogger("fxsparse")
        logger.removeHandler(self)
        logger.setLevel(self.before)


def _row(
    arguments: argparse.Namespace, report: fxsparse.Report, runs: Runs, together: Runs, stages: dict[str, float]
) -> dict[str, Any]:
    """`together` are the rounds that timed everything; `runs` may have more of ours and the best dense build."""
    dense = runs.fastest([name for name in runs.ms if name.startswith("dense")])
    slim = [name for name in runs.ms if name.startswith("slim")]
    ratios = runs.ratios(dense, "fxsparse")
    mac_ratio = report.macs_before / max(report.macs_after, 1)
    speedup = ratios[len(ratios) // 2]
    row = {
        **{k: getattr(arguments, k) for k in CASE},
        "params_before": report.params_before, "params_after": report.params_after,
        "macs_before": report.macs_before, "macs_after": report.macs_after, "mac_ratio": round(mac_ratio, 4),
        "chosen": report.chosen, "best_dense": dense, "dense_ms": round(runs.median(dense), 4),
        "fxsparse_ms": round(runs.median("fxsparse"), 4), "speedup": round(speedup, 4),
        "speedup_p20": round(ratios[len(ratios) // 5], 4), "speedup_p80": round(ratios[len(ratios) * 4 // 5], 4),
        "eta": round(speedup / mac_ratio, 4), "verification": report.verification,
        "mispredicted": _mispredicted(report),
    }  # fmt: skip
    if slim:
        best = runs.fastest(slim)
        against = together.ratios("fxsparse", best)
        row |= {"slim_ms": round(runs.median(best), 4), "over_slim": round(against[len(against) // 2], 4)}
    for build in ("torch.compile", "torch.compile alone"):
        if build in runs.ms:
            entrances = together.ratios(build, "fxsparse")
            row[build.replace(".", "_").replace(" ", "_")] = round(entrances[len(entrances) // 2], 4)
    row["builds_ms"] = {
        n: [round(t, 4) for t in (runs.quantile(n, 0.2), runs.median(n), runs.quantile(n, 0.8))] for n in runs.ms
    }
    return row | {"rounds": len(ratios), "stages_s": stages, **_provenance(arguments)}


def _mispredicted(report: fxsparse.Report) -> list[str]:
    """Layers for which the number of stored elements alone would have chosen otherwise than the measured time did."""
    timed = [d for d in report.decisions if d.step == "choose_formats" and "sparse_us" in d.data]
    return [f"{d.where}: {d.why}" for d in timed if (d.data["share"] < choose_formats.MODELLED) != d.accepted]


def _provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    cuda = arguments.device.startswith("cuda")
    return {
        "machine": torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {platform.machine()}",
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "fxsparse": fxsparse.__version__},
        "commit": commit(),
        "date": date.today().isoformat(),
        "command": command(arguments),
    }


def command(arguments: argparse.Namespace) -> str:
    """What measures the case again: every argument that is not the default, but for where the row goes."""
    words = ["python", "-m", "tools.bench"]
    for action in _parser()._actions:
        value = getattr(arguments, action.dest, action.default)
        if value != action.default and action.dest != "out":
            words += [action.option_strings[0], *[str(value)] * (action.nargs != 0)]
    return shlex.join(words)


def _append(path: Path | None, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
