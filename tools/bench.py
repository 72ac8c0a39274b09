"""The numbers. One case is one process and one JSON row:

    python -m tools.bench --model resnet50 --recipe refill_like --sparsity 0.5 --batch 1 --threads 2 --out rows.jsonl
    python -m tools.bench --suite spine --out tools/rows/NAME.jsonl     # every case of a suite, one after the other
    python -m tools.bench --matrix                                     # never slower? the rows of the suite "matrix"
    python -m tools.bench --readme                                     # the README's table from the rows in tools/rows

A row holds the median and spread of every dense build of the same masked model (eager and Inductor with freezing,
contiguous and channels_last, ONNX Runtime where it is installed), of a natively slim model of the same widths, and of
ours, all timed in turns in one process; the machine, versions, commit, date and command. Losing rows are rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.backend import find_target
from fxsparse.contest import dense_builds
from fxsparse.ir.capture import capture
from fxsparse.measure import AGAIN, Runs, cpu_name, play_off, settled
from fxsparse.passes import Context, canonicalize, choose_formats, run
from tools.block_recipes import BLOCK_RECIPES
from tools.decoder import DecodeStep, Prefill
from tools.recipes import RECIPES, randomize_batch_norm
from tools.slim import native_slim
from tools.transformer_recipes import heads_and_neurons

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tools" / "rows"
MARKS = ("<!-- rows: begin -->", "<!-- rows: end -->")
_CASE = ("model", "recipe", "sparsity", "rows", "batch", "threads", "dtype", "target")
SPINE: list[dict[str, Any]] = [
    *(
        {"model": model, "recipe": "refill_coupled", "batch": batch, "threads": threads}
        for model in ("resnet18", "resnet50", "vgg16")
        for batch in (1, 16)
        for threads in (1, 2)
    ),
    *(
        {"model": model, "recipe": "refill_like", "batch": 1, "threads": 1}
        for model in ("resnet18", "resnet50", "vgg16")
    ),
    *(
        {"model": model, "recipe": "refill_coupled", "batch": 1, "threads": 1}
        for model in ("mobilenet_v2", "densenet121")
    ),
    {"model": "mobilenet_v2", "recipe": "dead_rows_alive_bias", "batch": 1, "threads": 1},
    *({"model": "vit_b_16", "recipe": "heads_and_neurons", "batch": 1, "threads": threads} for threads in (1, 2)),
]
BLOCKS: list[dict[str, Any]] = [
    *(
        {"model": model, "recipe": "shuffled_blocks", "sparsity": 0.74, "rows": 64, "batch": batch, "threads": threads}
        for model, batches in (("resnet18", (1, 16)), ("resnet50", (1, 16)), ("vgg16", (1, 16)), ("vit_b_16", (1,)))
        for batch in batches
        for threads in (1, 2)
    ),
    *(
        {"model": "resnet50", "recipe": "shuffled_blocks", "sparsity": sparsity, "rows": rows, "batch": 1, "threads": 1}
        for sparsity, rows in ((0.15, 64), (0.5, 64), (0.74, 32), (0.74, 16), (0.74, 8), (0.9, 64), (0.95, 64))
    ),
    {"model": "resnet50", "recipe": "shuffled_blocks_apart", "sparsity": 0.74, "rows": 64, "batch": 1, "threads": 1},
    {"model": "mobilenet_v2", "recipe": "shuffled_blocks", "sparsity": 0.74, "rows": 32, "batch": 1, "threads": 1},
]
UNSTRUCTURED: list[dict[str, Any]] = [
    {"model": model, "recipe": "unstructured", "sparsity": sparsity, "batch": batch, "threads": threads}
    for model, sparsity, batch, threads in (
        ("resnet18", 0.9, 1, 1), ("resnet18", 0.95, 1, 1), ("resnet50", 0.8, 1, 1), ("resnet50", 0.9, 1, 1),
        ("resnet50", 0.95, 1, 1), ("resnet50", 0.9, 1, 2), ("resnet50", 0.9, 16, 1), ("resnet50", 0.95, 16, 1),
        ("vgg16", 0.9, 1, 1), ("mobilenet_v2", 0.9, 1, 1),
    )
]  # fmt: skip
MATRIX: list[dict[str, Any]] = [
    {"model": model, "recipe": recipe, "sparsity": sparsity, "batch": 1 + 15 * (i % 2), "threads": 1 + i // 2 % 2}
    for model in ("resnet18_cifar", "vgg16_cifar", "mobilenet_v1_cifar", "wrn32_2_cifar", "resnet18")
    for recipe in ("shuffled_blocks", "refill_coupled", "unstructured")
    for i, sparsity in enumerate((0.2, 0.5, 0.74, 0.95))
]
GPU: list[dict[str, Any]] = [
    {"model": model, "recipe": recipe, "sparsity": sparsity, "rows": rows, "batch": 32, "threads": 4, "dtype": dtype}
    | ({"batch": 1} if model == "prefill" else {})
    for model, recipe, sparsity, rows, dtype in (
        ("resnet50", "refill_coupled", 0.5, 32, "float16"), ("resnet50", "refill_coupled", 0.5, 32, "float32"),
        ("vit_b_16", "heads_and_neurons", 0.5, 32, "bfloat16"), ("vit_l_16", "two_four", 0.5, 32, "bfloat16"),
        ("vit_l_16", "shuffled_blocks", 0.74, 128, "bfloat16"), ("vit_b_16", "shuffled_blocks", 0.74, 128, "float32"),
        ("prefill", "shuffled_blocks", 0.74, 128, "bfloat16"), ("prefill", "two_four", 0.5, 32, "bfloat16"),
    )
]  # fmt: skip
Inputs = tuple[Tensor, ...]
OWN_MODELS: dict[str, Any] = {"decode_step": DecodeStep, "prefill": Prefill}
SUITES = {"spine": SPINE, "blocks": BLOCKS, "unstructured": UNSTRUCTURED, "matrix": MATRIX, "gpu": GPU}


def main(argv: Sequence[str] | None = None) -> int:
    """One case, a suite, or the README's table."""
    arguments = _parser().parse_args(argv)
    if arguments.readme:
        return write_readme()
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
    parser.add_argument("--model", default="resnet18", help="a name in models, torchvision.models or OWN_MODELS")
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
    parser.add_argument("--entrance", action="store_true", help="also time torch.compile(model, backend='fxsparse')")
    parser.add_argument("--suite", choices=list(SUITES), help="run every case of a suite that OUT lacks")
    parser.add_argument("--out", type=Path, help="append rows here (default: print only)")
    parser.add_argument("--matrix", action="store_true", help="print the committed rows of the suite matrix")
    parser.add_argument("--readme", action="store_true", help="write the README's table from tools/rows")
    return parser


def run_suite(arguments: argparse.Namespace) -> int:
    """Each case in a process of its own: threads and caches are its own too. What the file has is not run again."""
    failed = 0
    had = _rows_in(arguments.out) if arguments.out and arguments.out.exists() else []
    wanted = [{"dtype": arguments.dtype, **case, "target": arguments.target} for case in SUITES[arguments.suite]]
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
        ours["torch.compile"] = _torch_compile(model, masks, inputs, arguments.target)
    rivals = _dense(model, masks, inputs) | _onnxruntime(model, masks, inputs)
    with _Stages() as slim_stages:
        if arguments.slim and (arguments.recipe in RECIPES or arguments.recipe == "refill_coupled"):
            ours |= _slim(model, fast.report, inputs, arguments.target)
    runs = play_off(ours, rivals, arguments.seconds, bounds=AGAIN)  # many rounds: they may take half a millisecond
    longer = settled(runs, runs.fastest(list(rivals)), "fxsparse", {**ours, **rivals})
    return _row(arguments, fast.report, longer, runs, {**stages.seconds, "slim": sum(slim_stages.seconds.values())})


def build_model(name: str) -> nn.Module:
    """A model of `models`, torchvision or `OWN_MODELS`: seeded, in evaluation mode, batch norms that matter."""
    import torchvision.models

    import models

    torch.manual_seed(0)
    make = OWN_MODELS.get(name) or getattr(models, name, None) or getattr(torchvision.models, name)
    model: nn.Module = make().eval()
    for layer in model.modules():  # torchvision's ViT starts with a head of zeros: all that is before it would be dead
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    randomize_batch_norm(model, 1)
    return model


def example_inputs(model: nn.Module, arguments: argparse.Namespace) -> tuple[Tensor, ...]:
    """Images, but for a model that has inputs of its own."""
    if isinstance(model, (DecodeStep, Prefill)):
        return model.example_inputs(arguments.batch)
    side = arguments.side or (32 if arguments.model.endswith("_cifar") else 224)
    return (torch.randn(arguments.batch, 3, side, side, generator=torch.Generator().manual_seed(0)),)


def make_masks(recipe: str, model: nn.Module, sparsity: float, rows: int = 32) -> Mapping[str, Tensor]:
    """`refill_coupled` is refill_like with the channels of residual groups chosen together."""
    if recipe == "refill_coupled":
        return RECIPES["refill_like"](model, sparsity=sparsity, seed=0, coupled=True)  # type: ignore[call-arg]
    if recipe in BLOCK_RECIPES:
        return BLOCK_RECIPES[recipe](model, sparsity=sparsity, seed=0, rows=rows)
    return {**RECIPES, "heads_and_neurons": heads_and_neurons}[recipe](model, sparsity=sparsity, seed=0)


def _dense(model: nn.Module, masks: fxsparse.Masks, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """PyTorch's dense builds, whatever the target: what any of them has to beat."""
    target = find_target("inductor" if inputs[0].is_cuda else "inductor_cpp")
    builds = dense_builds(_captured(model, masks, inputs), inputs, target)
    return {f"dense: {b.name}": _call(b.run, b.prepare(inputs)) for b in builds}


def _torch_compile(model: nn.Module, masks: fxsparse.Masks, inputs: Inputs, target: str) -> Callable[[], object]:
    """The same through the other entrance."""
    masked = copy.deepcopy(model)
    masks.apply_(masked)
    options: dict[str, Any] = {"masks": masks, "target": target}
    return _call(torch.compile(masked, backend="fxsparse", options=options), inputs)


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
    return {f"slim: {b.name}": _call(b.run, b.prepare(inputs)) for b in builds if b.target.name in runners}


def _onnxruntime(model: nn.Module, masks: fxsparse.Masks, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The masked model in ONNX Runtime, on a CPU in float32, when it is installed."""
    if any(x.device.type != "cpu" or x.dtype not in (torch.float32, torch.int64) for x in inputs):
        return {}
    try:
        target = find_target("onnx")
    except fxsparse.TargetError:
        return {}
    run = target.lower_dense(_captured(model, masks, inputs), inputs)
    return {"dense: onnxruntime": _call(run, inputs)}


def _call(run: Callable[..., object], inputs: Sequence[Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return run(*inputs)

    return call


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
        **{k: getattr(arguments, k) for k in _CASE},
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
    if "torch.compile" in runs.ms:
        entrances = together.ratios("torch.compile", "fxsparse")
        row["torch_compile"] = round(entrances[len(entrances) // 2], 4)
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
    command = f"python -m tools.bench --model {arguments.model} --recipe {arguments.recipe}"
    command += f" --sparsity {arguments.sparsity} --rows {arguments.rows} --batch {arguments.batch}"
    command += f" --threads {arguments.threads} --target {arguments.target}" + " --entrance" * arguments.entrance
    return {
        "machine": torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {platform.machine()}",
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "fxsparse": fxsparse.__version__},
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "date": date.today().isoformat(),
        "command": command + f" --dtype {arguments.dtype} --device {arguments.device}",
    }


def git(*words: str) -> str:
    """What git says, or nothing."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _append(path: Path | None, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def load_rows(folder: str = "") -> list[dict[str, Any]]:
    """Committed rows, in the order of their files; those of the README's tables lie in `tools/rows` itself."""
    files = sorted((ROWS / folder).glob("*.jsonl"))
    return [row for path in files for row in _rows_in(path)]


def _rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def newest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of every case on every machine, where the first one of it stood."""
    return list({tuple(row.get(key) for key in ("machine", *_CASE)): row for row in rows}.values())


def by_machine(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The newest row of every case, a list for each machine."""
    machines = dict.fromkeys(r["machine"] for r in rows)
    return [[r for r in newest(rows) if r["machine"] == machine] for machine in machines]


def matrix(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many cases are slower than 0.98 times the best dense build, which, and what the cost model got wrong."""
    slower = [r for r in rows if r["speedup"] < 0.98]
    parts = [_table(rows, _BLOCK_COLUMNS), f"{len(rows)} cases, {len(slower)} below 0.98 times the best dense build"]
    parts += [
        f"  {r['model']} {r['recipe']} {r['sparsity']}: {r['speedup']} ({r['speedup_p20']} to {r['speedup_p80']}), "
        f"{r['chosen']} build against {r['best_dense']}"
        for r in slower
    ]
    wrong = [f"  {r['model']} {r['recipe']} {r['sparsity']}: {w}" for r in rows for w in r["mispredicted"]]
    return "\n".join([*parts, f"{len(wrong)} layers whose stored elements alone would have chosen otherwise", *wrong])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The README's tables: every case, winners and losers; channels that go, then blocks inside layers that stay.

    One pair of tables for each machine.
    """
    parts = []
    for here in by_machine(rows):
        blocks = [r for r in here if r["recipe"] in BLOCK_RECIPES]
        channels = [r for r in here if r["recipe"] not in BLOCK_RECIPES]
        parts += [_table(channels, _CHANNEL_COLUMNS), _table(blocks, _BLOCK_COLUMNS)]
    return "\n\n".join(part for part in parts if part)


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> str:
    from tabulate import tabulate

    if not rows:
        return ""
    every = {**_COLUMNS, **columns}
    lines = [[cell(r) for cell in every.values()] for r in rows]
    machines = sorted({f"{r['machine']}; torch {r['versions']['torch']}; {r['dtype']}; {r['date']}" for r in rows})
    text: str = tabulate(lines, list(every), tablefmt="github", disable_numparse=True)
    return text + "\n\n" + "\n".join(f"*{m}*" for m in machines)


_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "model": lambda r: str(r["model"]),
    "masks": lambda r: str(r["recipe"]).replace("_", " "),
    "sparsity": lambda r: f"{r['sparsity']:.0%}",
    "batch": lambda r: str(r["batch"]),
    "threads": lambda r: str(r["threads"]),
    "dtype": lambda r: str(r["dtype"]),
    "target": lambda r: str(r["target"]),
    "weights gone": lambda r: f"{1 - r['params_after'] / r['params_before']:.0%}",
    "MAC ratio": lambda r: f"{r['mac_ratio']:.2f}",
    "best dense ms": lambda r: f"{r['dense_ms']:.1f}",
    "fxsparse ms": lambda r: f"{r['fxsparse_ms']:.1f}",
    "speedup (p20-p80)": lambda r: f"**{r['speedup']:.2f}** ({r['speedup_p20']:.2f}-{r['speedup_p80']:.2f})",
    "speedup / MAC ratio": lambda r: f"{r['eta']:.2f}",
}
_CHANNEL_COLUMNS = {"time / natively slim": lambda r: f"{r['over_slim']:.3f}" if "over_slim" in r else ""}
_BLOCK_COLUMNS = {"rows of a group": lambda r: str(r["rows"])}


def write_readme() -> int:
    """Replace what stands between the marks in README.md."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    path.write_text(f"{before}{MARKS[0]}\n{table(load_rows())}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
