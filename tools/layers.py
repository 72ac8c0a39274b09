"""Single layers with shuffled blocks against oneDNN's dense convolution, on warm caches, timed in turns:

    python -m tools.layers --threads 1 --out tools/rows/layers/NAME.jsonl
    python -m tools.layers --table                                       # docs/architecture.md's table

`rate` is the share of the ideal: speedup x density. A network gains less than its layers: see tools/bench.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxsparse.formats.shuffled_block import pack
from fxsparse.formats.shuffled_block_op import multiply
from fxsparse.measure import cpu_name, interleave, onednn_convolution
from tools.bench import ROWS, git, load_rows
from tools.block_recipes import block_mask

# input channels, output channels, side, kernel, stride
LAYERS = (
    (64, 64, 56, 3, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1), (256, 512, 28, 3, 2),
    (64, 64, 224, 3, 1), (256, 64, 56, 1, 1), (64, 256, 56, 1, 1), (1024, 256, 14, 1, 1), (512, 2048, 7, 1, 1),
)  # fmt: skip
KINDS = ((64, 0.5), (64, 0.26), (64, 0.1), (32, 0.26), (16, 0.26))  # rows of a group, density


def main(argv: Sequence[str] | None = None) -> int:
    """Time every layer, or print the table of committed rows."""
    parser = argparse.ArgumentParser(prog="python -m tools.layers", description="See the module's text.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append rows here (default: print only)")
    parser.add_argument("--table", action="store_true", help=f"print the rows in {ROWS.name}/layers")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(load_rows("layers")))
        return 0
    torch.set_num_threads(arguments.threads)
    for layer in LAYERS:
        for rows, density in KINDS:
            line = json.dumps(_row(layer, rows, density, arguments))
            print(line, flush=True)
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    return 0


@torch.inference_mode()
def _row(
    layer: tuple[int, int, int, int, int], rows: int, density: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    ins, outs, side, kernel, stride = layer
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outs, ins, kernel, kernel, generator=generator)
    weight *= block_mask(weight, torch.arange(outs), 1 - density, rows, generator)
    x = torch.randn(arguments.batch, ins, side, side, generator=generator).to(memory_format=torch.channels_last)
    inside, packed = x.permute(0, 2, 3, 1), pack(weight)
    padding = kernel // 2
    dense = onednn_convolution(x, weight, [stride, padding, 1], 1)
    if dense is None:
        raise SystemExit("tools.layers compares with oneDNN on a CPU, and this build of torch has none")
    geometry: dict[str, Any] = {"stride": [stride] * 2, "padding": [padding] * 2}
    runs = interleave({"dense": dense, "packed": lambda: multiply(packed, inside, **geometry)}, seconds=0.5)
    speedup = statistics.median(runs.ratios("dense", "packed"))
    return {
        "layer": f"{ins}->{outs} {kernel}x{kernel} /{stride} at {side}", "rows": rows, "density": density,
        "batch": arguments.batch, "threads": arguments.threads, "dense_us": round(runs.median("dense") * 1e3, 1),
        "packed_us": round(runs.median("packed") * 1e3, 1), "speedup": round(speedup, 3),
        "rate": round(speedup * density, 3), "rounds": len(runs.ms["dense"]),
        "machine": f"{cpu_name()}, {platform.machine()}", "versions": {"torch": torch.__version__},
        "commit": git("rev-parse", "--short", "HEAD"), "date": date.today().isoformat(),
        "command": f"python -m tools.layers --threads {arguments.threads} --batch {arguments.batch}",
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per layer and number of threads, one column per kind: speedup, and the share of the ideal."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for r in rows:
        cells = lines.setdefault((r["layer"], str(r["threads"])), {})
        cells[f"R {r['rows']}, {r['density']}"] = f"{r['speedup']:.2f} ({r['rate']:.2f})"
    body = [[*key, *cells.values()] for key, cells in lines.items()]
    heads = ["layer", "threads", *next(iter(lines.values()), {})]
    machines = sorted({f"{r['machine']}; torch {r['versions']['torch']}; {r['date']}; {r['command']}" for r in rows})
    return str(tabulate(body, heads, tablefmt="github", disable_numparse=True)) + "\n\n" + "\n".join(machines)


if __name__ == "__main__":
    sys.exit(main())
