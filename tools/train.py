"""What each way of training with masks reaches on scikit-learn's handwritten digits, and what its masks gain compiled.

    python -m tools.train --density 0.1 --seed 0 --seed 1 --out tools/rows/train/NAME.jsonl
    python -m tools.train --table                     # docs/training.md's table from the committed rows

One row for each method and seed: a small residual network is trained for the same number of epochs by each, its masked
accuracy on 448 images that it has not seen, and the time of `fxsparse.compile`'s result beside the best dense build.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.demo import BATCH, Digits, accuracy, load_digits, trainer
from fxsparse.ir.masks import Masks
from fxsparse.machine import cpu_name
from fxsparse.prune import erk, erk_densities, grasp, magnitude, prunable, snip, synflow
from fxsparse.report import format_name
from fxsparse.train import dsb, imp, masked, rigl, sr_ste, top_kast
from models import resnet_small_cifar
from tools.tables import commit, github, load_rows, rows_in


class Run:
    """One network that is to be trained: what every method needs."""

    def __init__(self, digits: Digits, density: float, epochs: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = resnet_small_cifar(num_classes=10, in_channels=1, width=32)
        self.digits, self.density, self.epochs, self.seed = digits, density, epochs, seed
        self.train = trainer(digits, epochs, seed, lambda: None)
        self.steps = epochs * -(-len(digits.train_labels) // BATCH)
        self.weights = prunable(self.model)

    def whole(self) -> None:
        """The schedule, from its start to its end."""
        self.train(self.model, 0, self.epochs)

    def batches(self, count: int = 4) -> list[tuple[Tensor, Tensor]]:
        """Of training images."""
        parts = zip(self.digits.train_images.split(BATCH), self.digits.train_labels.split(BATCH), strict=True)
        return [batch for _, batch in zip(range(count), parts, strict=False)]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _under(masks: Callable[[Run], Masks]) -> Callable[[Run], Masks]:
    def method(run: Run) -> Masks:
        found = masks(run)
        with masked(run.model, found):
            run.whole()
        return found

    return method


def _during(context: Callable[[Run], Any]) -> Callable[[Run], Masks]:
    def method(run: Run) -> Masks:
        with context(run) as training:
            run.whole()
        return Masks(training.masks)

    return method


def _dense(run: Run) -> Masks:
    run.whole()
    return Masks({})


def _imp(run: Run) -> Masks:
    """Three rounds, each as long as any other method's training."""
    rate = 1 - run.density ** (1 / 3)
    return imp(run.model, run.train, epochs=run.epochs, rounds=3, rate=rate).masks


def _one_shot(run: Run) -> Masks:
    run.whole()
    masks = magnitude(run.weights, run.density)
    with masked(run.model, masks):
        run.whole()
    return masks


def _top_kast(run: Run) -> Masks:
    run.train = trainer(run.digits, run.epochs, run.seed, lambda: None, weight_decay=0.0)  # it has its own
    return _during(lambda r: top_kast(r.model, erk_densities(r.weights, r.density)))(run)


def _erk(run: Run) -> Masks:
    return erk(run.weights, run.density, seed=run.seed)


def _every(run: Run) -> int:
    return max(1, run.steps // 25)


METHODS: dict[str, Callable[[Run], Masks]] = {
    "dense": _dense,
    "magnitude, one shot": _one_shot,
    "imp, 3 rounds": _imp,
    "erk, fixed": _under(_erk),
    "snip": _under(lambda r: snip(r.model, _loss, r.batches(), r.density)),
    "grasp": _under(lambda r: grasp(r.model, _loss, r.batches(), r.density)),
    "synflow": _under(lambda r: synflow(r.model, (r.digits.train_images[:1],), r.density)),
    "set": _during(lambda r: rigl(r.model, _erk(r), steps=r.steps, every=_every(r), grow="random", seed=r.seed)),
    "rigl": _during(lambda r: rigl(r.model, _erk(r), steps=r.steps, every=_every(r))),
    "top_kast": _top_kast,
    "dsb 16": _during(lambda r: dsb(r.model, _erk(r), steps=r.steps, every=_every(r))),
    "sr_ste 2:4": _during(lambda r: sr_ste(r.model)),
}


def run_method(name: str, digits: Digits, density: float, epochs: int, seed: int) -> dict[str, Any]:
    """Train by one method, compile, and measure."""
    run = Run(digits, density, epochs, seed)
    start_s = time.perf_counter()
    masks = METHODS[name](run)
    trained_s = time.perf_counter() - start_s
    row = {"method": name, "seed": seed, "epochs": epochs, "asked": density, "accuracy": accuracy(run.model, digits),
           "density": 1 - masks.sparsity() if masks else 1.0, "trained_s": round(trained_s, 1)}  # fmt: skip
    if masks:
        fast = fxsparse.compile(run.model.eval(), masks, example_inputs=(digits.test_images[:BATCH],))
        report = fast.report
        stored = {r.stored for r in report.rows} - {"dense"}
        row |= {"dense_ms": report.dense_ms, "fxsparse_ms": report.sparse_ms, "speedup": report.speedup,
                "chosen": report.chosen, "stored": sorted(stored)}  # fmt: skip
    command = f"python -m tools.train --density {density} --epochs {epochs} --seed {seed}"
    return row | {
        "machine": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
        "date": date.today().isoformat(), "command": command,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method: means over the seeds, and the spread of the accuracy."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        some = [row for row in rows if row["method"] == name]
        points = [100 * row["accuracy"] for row in some]
        gains = [row["speedup"] if row["chosen"] != "dense" else 1.0 for row in some if row.get("speedup")]
        formats = sorted({format_name(f) for row in some for f in row.get("stored", ())})
        lines.append([name, f"{statistics.mean(r['density'] for r in some):.3f}",
                      f"{statistics.mean(points):.1f} ({min(points):.1f}-{max(points):.1f})",
                      f"{statistics.mean(gains):.2f}" if gains else "", ", ".join(formats)])  # fmt: skip
    first = rows[0]
    head = ["method", "density", "accuracy %", "speedup", "stored as"]
    run = f"{first['threads']} threads, batch {BATCH}; {first['epochs']} epochs, {len({r['seed'] for r in rows})} seeds"
    source = f"{first['machine']}; torch {first['torch']}; {run}; {first['date']}; python -m tools.train"
    return f"{github(lines, head)}\n\n*{source}*"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what OUT lacks, or print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train", description="Methods compared; see the module's text."
    )
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, action="append", help="may be given again (default: 0 and 1)")
    parser.add_argument("--out", type=Path, default=Path("build/train.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of the committed rows")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(load_rows("train")))
        return 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    had = {(row["method"], row["seed"]) for row in (rows_in(arguments.out) if arguments.out.exists() else [])}
    for seed in arguments.seed or (0, 1):
        digits = load_digits(seed)
        for name in METHODS:
            if (name, seed) not in had:
                row = run_method(name, digits, arguments.density, arguments.epochs, seed)
                print(f"{name:20} seed {seed}: {row['accuracy']:.2%} at {row['density']:.3f}", file=sys.stderr)
                with arguments.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
