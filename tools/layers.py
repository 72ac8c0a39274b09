"""Single layers of row groups against oneDNN's dense convolution, on warm caches, timed in turns:

    python -m tools.layers --threads 1 --out tools/rows/layers/NAME.jsonl
    python -m tools.layers --table                                       # docs/architecture.md's table
    python -m tools.layers --format n_m --out tools/rows/n_m/NAME.jsonl  # linear layers, 2:4 (--table: docs/n_m.md's)

Packed layers have rows or pixels in vector lanes (shuffled_block, unstructured), whichever is faster: the compiler
times both, too. A linear layer is compared with the fastest of PyTorch's product, oneDNN's and MKL's, weights packed.

`rate` is the share of the ideal: speedup x density. A network gains less than its layers: see tools/bench.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fxsparse.backend.memory import Memory
from fxsparse.backend.onednn import onednn_convolution, onednn_linear
from fxsparse.coarsen import n_m
from fxsparse.formats.n_m import pack as pack_n_m
from fxsparse.formats.n_m_op import multiply as multiply_n_m
from fxsparse.formats.n_m_op import n_m_into
from fxsparse.formats.shuffled_block import pack
from fxsparse.formats.shuffled_block_layer import fold
from fxsparse.formats.shuffled_block_op import as_run, multiply, shuffled_block_into
from fxsparse.kernels.shared import LANES
from fxsparse.machine import cpu_name
from fxsparse.measure import Runs, interleave
from tools.block_recipes import block_mask
from tools.tables import ROWS, commit, load_rows

# input channels, output channels, side, kernel, stride
LAYERS = (
    (64, 64, 56, 3, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1), (256, 512, 28, 3, 2),
    (64, 64, 224, 3, 1), (256, 64, 56, 1, 1), (64, 256, 56, 1, 1), (1024, 256, 14, 1, 1), (512, 2048, 7, 1, 1),
)  # fmt: skip
LINEAR = ((768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 11008))  # input features, output features
TOKENS = (1, 2, 4, 8)  # that share the weights
KINDS = (  # rows of a group, density
    (64, 0.5), (64, 0.26), (64, 0.1), (32, 0.26), (16, 0.26), (8, 0.26), (4, 0.1), (1, 0.1), (1, 0.05),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Time every layer, or print the table of committed rows."""
    parser = argparse.ArgumentParser(prog="python -m tools.layers", description="See the module's text.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of shuffled blocks")
    parser.add_argument("--format", choices=("shuffled_block", "n_m"), default="shuffled_block")
    parser.add_argument("--out", type=Path, help="append rows here (default: print only)")
    parser.add_argument("--table", action="store_true", help=f"print the rows in {ROWS.name}/layers")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(n_m_table(load_rows("n_m")) if arguments.format == "n_m" else table(load_rows("layers")))
        return 0
    torch.set_num_threads(arguments.threads)
    blocks = (_row(layer, *kind, arguments) for layer in LAYERS for kind in KINDS)
    dtypes = (torch.float32, torch.bfloat16)
    two_four = (_n_m_row(sizes, n, dtype, arguments) for dtype in dtypes for sizes in LINEAR for n in TOKENS)
    for row in two_four if arguments.format == "n_m" else blocks:
        line = json.dumps(row)
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
    dtype = getattr(torch, arguments.dtype)
    weight = (weight * block_mask(weight, torch.arange(outs), 1 - density, rows, generator)).to(dtype)
    x = torch.randn(arguments.batch, ins, side, side, generator=generator)
    x = x.to(dtype, memory_format=torch.channels_last)
    inside, padding = x.permute(0, 2, 3, 1), kernel // 2
    dense = onednn_convolution(x, weight, [stride, padding, 1], 1)
    if dense is None:
        raise SystemExit("tools.layers compares with oneDNN on a CPU, and this build of torch has none")
    kept = Memory()  # as in a network: see fxsparse/backend/memory.py

    def packed(lanes: str) -> Callable[[], object]:
        found = as_run(pack(weight, lanes=lanes))
        out = multiply(found, inside, stride=[stride] * 2, padding=[padding] * 2)
        folded = fold(found.tensors, None, found.shape, [[stride] * 2, [padding] * 2, [1, 1]], "none", lanes)
        return lambda: shuffled_block_into(inside, found.values, folded, None, kept.empty_like(out))

    runs = interleave({"dense": dense, **{lanes: packed(lanes) for lanes in LANES}}, seconds=0.75)
    command = (
        f"python -m tools.layers --threads {arguments.threads} --batch {arguments.batch} --dtype {arguments.dtype}"
    )
    return {
        "layer": f"{ins}->{outs} {kernel}x{kernel} /{stride} at {side}", "rows": rows, "density": density,
        "batch": arguments.batch, "dtype": arguments.dtype, "lanes": (best := runs.fastest(list(LANES))),
        **_measured(runs, "dense", best, density, arguments, command),
    }  # fmt: skip


@torch.inference_mode()
def _n_m_row(sizes: tuple[int, int], tokens: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    ins, outs = sizes
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(0))
    weight = (weight * n_m({"": weight}, {"": torch.ones_like(weight)}).masks[""]).to(dtype)
    packed = pack_n_m(weight, 2, 4)
    x = torch.randn(tokens, ins, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense: dict[str, Callable[[], object] | None] = {
        "torch": lambda: torch.nn.functional.linear(x, weight),
        "onednn": onednn_linear(x, weight),
        "mkl": _mkl(x, weight),
    }  # fmt: skip
    builds = {name: call for name, call in dense.items() if call is not None}
    out, call = multiply_n_m(packed, x), partial(n_m_into, x, packed.values, packed.codes, None, outs, ins, 2, 4)
    kept = Memory()
    runs = interleave({**builds, "packed": lambda: call(kept.empty_like(out))}, seconds=1.0)
    command = f"python -m tools.layers --format n_m --threads {arguments.threads}"
    return {
        "layer": f"{ins}->{outs}", "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
        "pattern": "2:4", "best_dense": runs.fastest(list(builds)),
        **_measured(runs, runs.fastest(list(builds)), "packed", 0.5, arguments, command),
    }  # fmt: skip


def _mkl(x: Tensor, weight: Tensor) -> Callable[[], object] | None:
    """MKL's product with packed weights, as Inductor calls it."""
    if x.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return None
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x))
    return lambda: torch.ops.mkl._mkl_linear(x, packed, weight, None, len(x))


def _measured(
    runs: Runs, dense: str, packed: str, density: float, arguments: argparse.Namespace, command: str
) -> dict[str, Any]:
    """What every row says of its runs, and where it comes from."""
    speedup = statistics.median(runs.ratios(dense, packed))
    return {
        "threads": arguments.threads, "dense_us": round(runs.median(dense) * 1e3, 1),
        "packed_us": round(runs.median(packed) * 1e3, 1), "speedup": round(speedup, 3),
        "rate": round(speedup * density, 3), "rounds": len(runs.ms[packed]),
        "machine": f"{cpu_name()}, {platform.machine()}", "versions": {"torch": torch.__version__},
        "commit": commit(), "date": date.today().isoformat(), "command": command,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per layer, dtype and number of threads, one column per kind: speedup, and the share of the ideal.

    One table for each machine.
    """
    machines = dict.fromkeys(r["machine"] for r in rows)
    return "\n\n".join(_layers_of([r for r in rows if r["machine"] == machine]) for machine in machines)


def _layers_of(rows: Sequence[Mapping[str, Any]]) -> str:
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for r in rows:
        cells = lines.setdefault((r["layer"], r["dtype"], str(r["threads"])), {})
        cells[f"R {r['rows']}, {r['density']}"] = f"{r['speedup']:.2f} ({r['rate']:.2f})"
    return _drawn(lines, ["layer", "dtype", "threads"], rows)


def n_m_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per layer, dtype and number of threads, one column per number of tokens: speedup."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for r in rows:
        cells = lines.setdefault((r["layer"], r["dtype"], str(r["threads"])), {})
        cells[f"{r['tokens']} token" + "s" * (r["tokens"] > 1)] = f"{r['speedup']:.2f}"
    return _drawn(lines, ["layer", "dtype", "threads"], rows)


def _drawn(
    lines: Mapping[tuple[str, ...], Mapping[str, str]], keys: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> str:
    """The table, and where its rows come from."""
    body = [[*key, *cells.values()] for key, cells in lines.items()]
    heads = [*keys, *next(iter(lines.values()), {})]
    machines = sorted({f"{r['machine']}; torch {r['versions']['torch']}; {r['date']}; {r['command']}" for r in rows})
    return str(tabulate(body, heads, tablefmt="github", disable_numparse=True)) + "\n\n" + "\n".join(machines)


if __name__ == "__main__":
    sys.exit(main())
