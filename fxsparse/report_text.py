"""The report as text: a table of weights, totals, the time of each build, what was decided and why."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from tabulate import tabulate

from fxsparse.report import (
    Reason,
    Report,
    Row,
    Timing,
    accepted_by_pass,
    count,
    duration,
    elsewhen,
    percent,
    reasons,
    shape_change,
    stored_as,
)

_WIDTH = 138  # characters in a line of the table
_NAME_WIDTH = 24
_REASONS_SHOWN = 12
_COLLAPSE_ABOVE = 8  # so many untouched weights are still shown one by one


def text(report: Report) -> str:
    """The whole of it, in lines of at most 138 characters."""
    parts = (_heading(report), _weights(report.rows), _totals(report), _timings(report.timings), _decisions(report))
    environment = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    return "\n\n".join(part for part in (*parts, _wrap(environment)) if part)


def _heading(report: Report) -> str:
    sentences = [_wrap(text) for text in (report.warning, report.verdict) if text]
    return "\n".join([f"fxsparse report, target {report.target}", *sentences])


# the table of weights


def _weights(rows: Sequence[Row]) -> str:
    """One line or a few per weight. Untouched weights become a count when there are many."""
    untouched = [row for row in rows if row.untouched]
    collapsed = untouched if len(untouched) > _COLLAPSE_ABOVE else []
    shown = [row for row in rows if not (collapsed and row.untouched)]
    parts = [_table(_columns(shown))] if shown else []
    if collapsed:
        low, high = min(row.density for row in collapsed), max(row.density for row in collapsed)
        parts.append(
            f"{'and ' if shown else ''}{len(collapsed)} weights with nothing to remove and nothing in the way "
            f"(density {low:.2f} to {high:.2f}, {count(sum(row.params_after for row in collapsed))} parameters)"
        )
    if rows and all(row.density == 1 and row.untouched for row in rows):
        parts.append("No weight of a convolution or linear layer is masked: there is nothing to make faster.")
    return "\n".join(parts)


def _columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Header to cells. Columns that would be empty are left out; the reasons take the width that is left."""
    lines = 5 if len(rows) <= 40 else 1
    names = short_names([row.name for row in rows], _NAME_WIDTH)
    measured: dict[str, Callable[[Row], str]] = {
        "density": lambda row: f"{row.density:.3f}",
        "rows\nremoved": lambda row: str(row.rows_removed or ""),
        "columns\nremoved": lambda row: str(row.columns_removed or ""),
        "stored as": lambda row: stored_as(row) if any(r.stored != "dense" for r in rows) else "",
        "params": lambda row: f"{count(row.params_after)} {percent(row.params_after, row.params_before):>4}",
        "MACs": lambda row: f"{count(row.macs_after)} {percent(row.macs_after, row.macs_before):>4}",
        "dense\nus": lambda row: duration(row.dense_us),
        "sparse\nus": lambda row: duration(row.sparse_us),
    }
    columns = {"weight": names, "shape -> new shape": [shape_change(row) for row in rows]}
    columns |= {header: [cell(row) for row in rows] for header, cell in measured.items()}
    columns = {header: cells for header, cells in columns.items() if any(cells)}
    width = max(20, _WIDTH - sum(_cell_width([header, *cells]) + 2 for header, cells in columns.items()))
    kept, blocked = any(row.kept_for for row in rows), any(row.blocked_by for row in rows)
    dense = any(row.dense_for for row in rows)
    if kept or blocked or dense:
        header = " / ".join(["kept for"] * kept + ["blocked by"] * blocked + ["stored dense for"] * dense)
        columns[header] = [_why(row, width, lines) for row in rows]
    return columns


def _why(row: Row, width: int, lines: int) -> str:
    """The reasons, each from a new line; one after the other and without names when that is more than `lines`."""
    full = [line for item in _reasons_of(row) for line in textwrap.wrap(item, width, subsequent_indent=" ")]
    if len(full) <= lines:
        return "\n".join(full)
    return "\n".join(textwrap.wrap(", ".join(_in_brief(_reasons_of(row))), width))


def _reasons_of(row: Row) -> list[str]:
    blocked = [f"blocked by {row.blocked_by}"] if row.blocked_by else []
    return [*row.kept_for, *blocked, *([f"dense: {row.dense_for}"] if row.dense_for else [])]


def _in_brief(reasons: Iterable[str]) -> list[str]:
    """`coupled with layer1.0.conv2 by add (3 rows)` is `coupled (3 rows)`; those alike are added up."""
    numbers: Counter[tuple[str, str]] = Counter()
    for reason in reasons:
        found = re.fullmatch(r"(.+?)(?:(?: with |: ).*)? \((\d+) (row|column)s?\)", reason)
        numbers[(found[1], found[3]) if found else (reason, "")] += int(found[2]) if found else 1
    return [f"{text} ({n} {kind}{'s' * (n != 1)})" if kind else text for (text, kind), n in numbers.items()]


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names without `.weight`, folders abbreviated from the left until they fit; in full where two would be equal.

    A folder that one name has to abbreviate is abbreviated in all, and those alike but for a number with it.
    """
    paths = {name: name.removesuffix(".weight").split(".") for name in names}
    folders = {_numberless(path[:n]) for path in paths.values() for n in range(1, _abbreviated(path, width) + 1)}
    short = {name: _short(path, folders) for name, path in paths.items()}
    seen = Counter(short.values())
    return [short[name] if seen[short[name]] == 1 else name for name in names]


def _abbreviated(path: Sequence[str], width: int) -> int:
    """How many of its folders are abbreviated before it fits."""
    for n in range(len(path)):
        if len(".".join([*map(_initial, path[:n]), *path[n:]])) <= width:
            return n
    return len(path) - 1


def _short(path: Sequence[str], folders: Container[str]) -> str:
    """`features.denseblock3.layer24.conv2` is `f.d3.layer24.conv2`."""
    return ".".join(_initial(part) if _numberless(path[: i + 1]) in folders and i < len(path) - 1 else part
                    for i, part in enumerate(path))  # fmt: skip


def _initial(part: str) -> str:
    """Its first letter, with the digits behind it."""
    return re.sub(r"^(\D).*?(\d*)$", r"\1\2", part)


def _numberless(folder: Sequence[str]) -> str:
    return re.sub(r"\d+", "#", ".".join(folder))


def _cell_width(cells: Iterable[str]) -> int:
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    """Text to the left, numbers to the right. The header is a row of the body: tabulate pads real headers by two."""
    rule = ["-" * _cell_width([header, *cells]) for header, cells in columns.items()]
    body = [list(columns), rule, *zip(*columns.values(), strict=True)]
    left = ("weight", "shape", "stored", "kept", "blocked", "build", "pass", "reason", "first")
    align = ["left" if header.startswith(left) else "right" for header in columns]
    return str(tabulate(body, tablefmt="plain", colalign=align, disable_numparse=True))


# the sentences below it


def _totals(report: Report) -> str:
    lines = [
        _change("parameters", count(report.params_before), count(report.params_after))
        + f" ({percent(report.params_after, report.params_before)})",
        _change("MACs", count(report.macs_before), count(report.macs_after))
        + f" ({percent(report.macs_after, report.macs_before)}), one sample",
    ]
    if report.dense_ms is not None and report.sparse_ms is not None:
        change = _change("time", f"{duration(report.dense_ms)} ms", f"{duration(report.sparse_ms)} ms")
        lines.append(change + (", medians; the speedup is the median over rounds" if report.speedup_median else ""))
    if report.verification:
        lines.append(f"{'verified':<12}{report.verification}")
    return "\n".join(lines)


def _change(label: str, before: str, after: str) -> str:
    return f"{label:<12}{before} -> {after}"


def _timings(timings: Sequence[Timing]) -> str:
    if not timings:
        return ""
    columns = {
        "build": [t.build + " *" * (not t.together) for t in timings],
        "median ms": [duration(t.median_ms) for t in timings],
        "p20 ms": [duration(t.p20_ms) for t in timings],
        "p80 ms": [duration(t.p80_ms) for t in timings],
        "runs": [str(t.runs) for t in timings],
    }
    return f"{_table(columns)}\n{elsewhen(timings)}".rstrip()


def _decisions(report: Report) -> str:
    found = reasons(report.decisions)
    accepted = accepted_by_pass(report.decisions)
    refused = sum(len(reason.decisions) for reason in found)
    by_pass = ", ".join(f"{step} {n}" for step, n in accepted.items())
    lines = [_wrap(f"decisions accepted: {sum(accepted.values())}" + (f" ({by_pass})" if by_pass else ""))]
    lines.append(f"decisions refused: {refused}" + (", by reason:" if refused else ""))
    if found:
        lines.append(_table(_reason_columns(found[:_REASONS_SHOWN])))
    if hidden := found[_REASONS_SHOWN:]:
        number = sum(len(reason.decisions) for reason in hidden)
        lines.append(f"and {number} more for {len(hidden)} other reasons; report.decisions has them all")
    return "\n".join(lines)


def _reason_columns(found: Sequence[Reason]) -> dict[str, list[str]]:
    columns = {
        "refused": [str(len(reason.decisions)) for reason in found],
        "pass": [reason.step for reason in found],
        "first at": short_names([reason.decisions[0].where for reason in found], _NAME_WIDTH),
    }
    width = max(40, _WIDTH - sum(_cell_width([header, *cells]) + 2 for header, cells in columns.items()))
    texts = [reason.why + (" (and alike)" if reason.alike else "") for reason in found]
    return columns | {"reason": ["\n".join(textwrap.wrap(text, width)) for text in texts]}


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH))
