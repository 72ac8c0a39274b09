"""Committed rows, and the tables that the README and the documents show of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.block_recipes import BLOCK_RECIPES

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tools" / "rows"
CASE = ("model", "recipe", "sparsity", "rows", "batch", "side", "threads", "dtype", "target")
MARKS = ("<!-- rows: begin -->", "<!-- rows: end -->")


def load_rows(folder: str = "") -> list[dict[str, Any]]:
    """Committed rows, in the order of their files; those of the README's tables lie in `tools/rows` itself."""
    files = sorted((ROWS / folder).glob("*.jsonl"))
    return [row for path in files for row in rows_in(path)]


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Of one file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def newest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of every case on every machine, where the first one of it stood."""
    return list({tuple({"side": 0, **row}.get(key) for key in ("machine", *CASE)): row for row in rows}.values())


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
