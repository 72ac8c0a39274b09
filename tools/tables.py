"""Committed rows, and the tables that the documents show of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from tools.block_recipes import BLOCK_RECIPES
from tools.cases import HEADLINES

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tools" / "rows"
CASE = ("model", "recipe", "sparsity", "rows", "batch", "side", "threads", "dtype", "target")
LABELS = {
    "AMD EPYC (family 26, model 2), AVX512, x86_64": "EPYC Zen 5, AVX-512",
    "AMD EPYC (family 25, model 17), AVX512, x86_64": "EPYC Zen 4, AVX-512",
    "AMD EPYC, AVX2, x86_64": "EPYC Zen 3, AVX2",
    "NVIDIA H200": "H200",
}
MARKS = ("<!-- rows: begin -->", "<!-- rows: end -->")


def load_rows(folder: str = "") -> list[dict[str, Any]]:
    """Committed rows, in the order of their files; whole models' lie in `tools/rows` itself."""
    files = sorted((ROWS / folder).glob("*.jsonl"))
    return [row for path in files for row in rows_in(path)]


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Of one file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def commit() -> str:
    """Short hash of what runs, with a + when the tree has changes."""
    words = ("git", "describe", "--always", "--dirty=+", "--exclude=*")
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


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
    """The tables of docs/benchmarks.md: every case, losers too; for each machine channels that go, then blocks."""
    parts = []
    for here in _labeled(by_machine(rows)):
        blocks = [r for r in here if r["recipe"] in BLOCK_RECIPES]
        scattered = [r for r in here if r["recipe"] == "unstructured"]
        channels = [r for r in here if r not in blocks and r not in scattered]
        kinds = {"channels": (channels, _CHANNEL_COLUMNS), "blocks": (blocks, _BLOCK_COLUMNS)}
        for what, (some, columns) in (kinds | {"scattered zeros": (scattered, {})}).items():
            parts += [f"### {label(here[0]['machine'])}: {what}", _table(some, columns)] if some else []
    return "\n\n".join(parts)


def headlines(rows: Sequence[Mapping[str, Any]]) -> str:
    """The README's tables: a few cases, a column for each machine; what runs on a GPU has a table of its own."""
    machines = _labeled(by_machine(rows))
    kinds = [[m for m in machines if ("NVIDIA" in m[0]["machine"]) is gpu] for gpu in (False, True)]
    return "\n\n".join(_headlines(some) for some in kinds if some)


def _headlines(machines: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for case in HEADLINES:
        cells = [next((_gain(r) for r in rows if case.items() <= r.items()), "") for rows in machines]
        if any(cells):
            lines.append([*(cell(case) for cell in _HEADLINE_COLUMNS.values()), *cells])
    return github(lines, [*_HEADLINE_COLUMNS, *(label(rows[0]["machine"]) for rows in machines)])


def _gain(row: Mapping[str, Any]) -> str:
    return f"**{row['speedup']:.2f}** of {row['mac_ratio']:.2f}"


def label(machine: str) -> str:
    """What the documents call a machine of the rows."""
    return LABELS.get(machine, machine)


def _labeled(machines: Sequence[list[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
    order = list(LABELS)
    return sorted(machines, key=lambda rows: order.index(rows[0]["machine"]) if rows[0]["machine"] in order else 99)


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> str:
    if not rows:
        return ""
    every = {**_COLUMNS, **columns}
    lines = [[cell(r) for cell in every.values()] for r in rows]
    machines = sorted({f"{r['machine']}; torch {r['versions']['torch']}; {r['dtype']}; {r['date']}" for r in rows})
    return github(lines, list(every)) + "\n\n" + "\n".join(f"*{m}*" for m in machines)


def github(lines: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table of Markdown, its cells as they are."""
    text: str = tabulate(lines, head, tablefmt="github", disable_numparse=True)
    return text


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
_HEADLINE_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    **{name: _COLUMNS[name] for name in ("model", "masks", "sparsity", "batch", "threads", "dtype")},
    "masks": lambda r: str(r["recipe"]).replace("_", " ") + f" of {r['rows']} rows" * ("blocks" in r["recipe"]),
}
_BLOCK_COLUMNS = {"rows of a group": lambda r: str(r["rows"])}


def write_documents() -> int:
    """Replace what stands between the marks in README.md and docs/benchmarks.md."""
    rows = load_rows()
    for name, tables in (("README.md", headlines(rows)), ("docs/benchmarks.md", table(rows))):
        path = ROOT / name
        before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
        path.write_text(f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")
    return 0
