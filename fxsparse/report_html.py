"""The report as one page: no network, no scripts, inline SVG charts, PNG pictures of the masks in data URIs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from fxsparse.ir.decision import Plan
from fxsparse.ir.files import whole_file, writable
from fxsparse.picture import PIXELS, data_uri, picture
from fxsparse.report import (
    Report,
    Row,
    count,
    duration,
    elsewhen,
    percent,
    reasons,
    shape_change,
    stored_as,
)
from fxsparse.report_style import STYLE
from fxsparse.report_text import short_names

_PICTURES = 24
_BARS = 40
_COLLAPSE_ABOVE = 8
_MAGNIFY = 8  # a small picture is shown so many times larger, at most


def write_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page to `path`, whole or not at all; missing folders are made. Raises InputError where none can be."""
    with whole_file(writable(path, "report.html")) as name:
        name.write_bytes(page(report).encode())


def page(report: Report) -> str:
    """The whole page as text."""
    title = f"fxsparse report: {escape(report.target)}"
    body = "\n".join(
        [
            f'<header><h1>fxsparse report</h1><span class="chip">target {escape(report.target)}</span></header>',
            _verdict(report),
            _tiles(report),
            _section("Time of each build", _builds(report)),
            _section("Time of each layer", _layers(report.rows)),
            _section("Weights", _weights(report.rows)),
            _section("Masks", _pictures(report)),
            _section("Decisions", _decisions(report)),
            _section("Measured on", _environment(report)),
        ]
    )
    # The policy makes "no network" a property that the browser enforces.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>" if content else ""


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


# headline


def _verdict(report: Report) -> str:
    kind = {"dense": "warn", "sparse": "good"}.get(report.chosen, "plain")
    verified = f"<br><span>Verified: {escape(report.verification)}</span>" if report.verification else ""
    warning = f'<p class="verdict warn">{escape(report.warning)}</p>\n' if report.warning else ""
    return f'{warning}<p class="verdict {kind}">{escape(report.verdict)}{verified}</p>'


def _tiles(report: Report) -> str:
    tiles = []
    whose = ", rewritten build" if report.chosen == "dense" else ""
    if report.speedup is not None:
        low, high = report.speedup_low, report.speedup_high
        spread = f"{low:.2f} to {high:.2f} in pairs" if low is not None and high is not None else ""
        tiles.append(
            _tile(
                "Speedup",
                f"{report.speedup:.2f}<small>times</small>",
                spread,
                "hero" if report.speedup >= 1 else "hero slow",
            )
        )
    if report.dense_ms is not None and report.sparse_ms is not None:
        tiles.append(_before_after(f"Time{whose}", report.dense_ms, report.sparse_ms, lambda ms: f"{duration(ms)} ms"))
    tiles.append(_before_after(f"Parameters{whose}", report.params_before, report.params_after, count))
    tiles.append(_before_after(f"MACs, one sample{whose}", report.macs_before, report.macs_after, count))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _before_after(label: str, before: float, after: float, say: Callable[[float], str]) -> str:
    share = min(100.0, 100 * after / before) if before else 100.0
    detail = f"{percent(after, before)} of {say(before)}" if before else f"of {say(before)}"
    return _tile(label, say(after), detail, meter=share)


def _tile(label: str, value: str, detail: str, kind: str = "", meter: float | None = None) -> str:
    """`value` is markup, `label` and `detail` are text."""
    bar = "" if meter is None else f'<div class="meter"><i style="width:{meter:.1f}%"></i></div>'
    return (
        f'<div class="tile {kind}"><div class="label">{escape(label)}</div><div class="value">{value}</div>'
        f'{bar}<div class="detail">{escape(detail)}</div></div>'
    )


# bars


@dataclass(frozen=True)
class _Bar:
    kind: str  # "dense" or "sparse": its color
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class _Group:
    label: str
    title: str
    bars: tuple[_Bar, ...]
    note: str
    slower: bool = False


def _builds(report: Report) -> str:
    groups = [
        _Group(
            label=timing.build + " *" * (not timing.together),
            title=f"{timing.build}: median of {timing.runs} runs",
            bars=(_Bar(_kind(timing.build), timing.median_ms, timing.p20_ms, timing.p80_ms),),
            note=f"{duration(timing.median_ms)} ms  ({duration(timing.p20_ms)} to {duration(timing.p80_ms)})",
        )
        for timing in report.timings
    ]
    if not groups:
        return ""
    runs = sorted({timing.runs for timing in report.timings})
    said = str(runs[0]) if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    notes = [f"Median of {said} interleaved runs; the line spans p20 to p80.", elsewhen(report.timings)]
    chart = _chart("Time of each build", groups, thick=16)
    return chart + "".join(_note(note) for note in notes if note)


def _kind(build: str) -> str:
    return "sparse" if build.startswith("sparse") else "dense"


def _layers(rows: Sequence[Row]) -> str:
    timed = [
        (row, row.dense_us, row.sparse_us) for row in rows if row.dense_us is not None or row.sparse_us is not None
    ]
    if not timed:
        return ""
    largest = sorted(range(len(timed)), key=lambda i: -max(timed[i][1] or 0, timed[i][2] or 0))[:_BARS]
    shown = [timed[i] for i in sorted(largest)]
    labels = short_names([row.name for row, _, _ in shown], 30)
    groups = [_layer(label, *item) for label, item in zip(labels, shown, strict=True)]
    rest = len(timed) - len(shown)
    said = f" The {rest} fastest layers are left out." if rest else ""
    legend = '<p class="legend"><i class="dense"></i>dense <i class="sparse"></i>sparse</p>'
    chart = _chart("Time of each layer, dense and sparse", groups, thick=9)
    return legend + chart + _note(f"Each layer alone, in microseconds.{said}")


def _layer(label: str, row: Row, dense: float | None, sparse: float | None) -> _Group:
    bars = tuple(_Bar(kind, us) for kind, us in (("dense", dense), ("sparse", sparse)) if us is not None)
    note = f"{duration(dense) or '-'} \N{RIGHTWARDS ARROW} {duration(sparse) or '-'} \N{MICRO SIGN}s"
    if dense is not None and sparse:
        note += f"  {dense / sparse:.2f}\N{MULTIPLICATION SIGN}"
    slower = dense is not None and sparse is not None and sparse > dense
    return _Group(label, row.name, bars, note, slower)


def _chart(title: str, groups: Sequence[_Group], thick: int) -> str:
    """Horizontal bars from zero, one scale for all. `thick` is the height of a bar in pixels.

    Who has the page read aloud hears `title` and what is written at the bars.
    """
    label, room, width = 236, 640, 1120
    top = max((max(bar.value, bar.high or 0) for group in groups for bar in group.bars), default=0) or 1
    parts, y = [], 6
    for group in groups:
        height = len(group.bars) * (thick + 2)
        middle = y + height / 2 + 4
        parts.append(f"<g><title>{escape(group.title)}</title>")
        parts.append(f'<text x="{label - 12}" y="{middle:.0f}" class="name">{escape(group.label)}</text>')
        parts += [_bar(bar, label, y + i * (thick + 2), room / top, thick) for i, bar in enumerate(group.bars)]
        kind = "figure slow" if group.slower else "figure"
        parts.append(f'<text x="{label + room + 14}" y="{middle:.0f}" class="{kind}">{escape(group.note)}</text></g>')
        y += height + 8
    axis = f'<line x1="{label}" x2="{label}" y1="2" y2="{y - 4}" class="axis"/>'
    said = escape(f"{title}. " + "; ".join(f"{group.title}: {group.note}" for group in groups))
    svg = f'<svg viewBox="0 0 {width} {y}" role="img" aria-label="{said}">{axis}{"".join(parts)}</svg>'
    return f'<div class="wide">{svg}</div>'


def _bar(bar: _Bar, x: int, y: int, scale: float, thick: int) -> str:
    drawn = f'<rect x="{x}" y="{y}" width="{max(1.0, bar.value * scale):.1f}" height="{thick}" class="{bar.kind}"/>'
    if bar.low is None or bar.high is None:
        return drawn
    low, high, middle = x + bar.low * scale, x + bar.high * scale, y + thick / 2
    ends = "".join(f"M{end:.1f} {middle - 4}v8" for end in (low, high))
    return drawn + f'<path d="M{low:.1f} {middle}H{high:.1f}{ends}" class="whisker"/>'


# tables


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Row], str]  # gives markup
    number: bool = True


def _weights(rows: Sequence[Row]) -> str:
    untouched = [row for row in rows if row.untouched]
    fold = len(untouched) > _COLLAPSE_ABOVE
    shown = [row for row in rows if not (fold and row.untouched)]
    parts = [_weight_table(shown)] if shown else []
    if fold:
        summary = f"{len(untouched)} weights with nothing to remove and nothing in the way"
        parts.append(f"<details><summary>{summary}</summary>{_weight_table(untouched)}</details>")
    return "".join(parts)


def _weight_table(rows: Sequence[Row]) -> str:
    columns = [
        _Column("weight", _name, number=False),
        _Column("shape", _shape, number=False),
        _Column("density", lambda row: f"{row.density:.3f}"),
        _Column("rows removed", lambda row: str(row.rows_removed or "")),
        _Column("columns removed", lambda row: str(row.columns_removed or "")),
        _Column(
            "stored as",
            lambda row: "" if row.stored == "dense" else stored_as(row),
            number=False,
        ),
        _Column("parameters", lambda row: _left(row.params_after, row.params_before)),
        _Column("MACs", lambda row: _left(row.macs_after, row.macs_before)),
        _Column("dense \N{MICRO SIGN}s", lambda row: duration(row.dense_us)),
        _Column("sparse \N{MICRO SIGN}s", lambda row: duration(row.sparse_us)),
        _Column("why no more", _why, number=False),
    ]
    used = [column for column in columns if any(column.cell(row) for row in rows)]
    head = [(column.title, column.number) for column in used]
    return _table(head, [[column.cell(row) for column in used] for row in rows])


def _table(head: Sequence[tuple[str, bool]], body: Iterable[Sequence[str]]) -> str:
    """A table of markup cells; `head` holds each column's title and whether it holds numbers."""
    kinds = [' class="n"' if number else "" for _, number in head]
    titles = "".join(f"<th{kind}>{escape(title)}</th>" for kind, (title, _) in zip(kinds, head, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
        for cells in body
    ]
    body_text = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>\n{body_text}\n</tbody></table></div>'


def _name(row: Row) -> str:
    short = row.name.removesuffix(".weight")
    kind, text = ("long", _breakable(short)) if len(short) > 30 else ("short", escape(short))
    return f'<code class="{kind}" title="{escape(row.name)}">{text}</code><br><small>{escape(row.op)}</small>'


def _why(row: Row) -> str:
    lines = [f"kept: {escape(text)}" for text in row.kept_for]
    lines += [f"blocked by <code>{escape(row.blocked_by)}</code>"] if row.blocked_by else []
    return "<br>".join(lines + ([f"dense: {escape(row.dense_for)}"] if row.dense_for else []))


def _shape(row: Row) -> str:
    before, _, after = shape_change(row).replace("x", "\N{MULTIPLICATION SIGN}").partition(" -> ")
    return f"<span>{before}</span>" + (f" <span>\N{RIGHTWARDS ARROW} {after}</span>" if after else "")


def _left(after: int, before: int) -> str:
    return f"{count(after)} <small>{escape(percent(after, before))}</small>"


def _breakable(name: str) -> str:
    """A dotted name that may be broken after its dots."""
    return escape(name).replace(".", ".<wbr>")


def _decisions(report: Report) -> str:
    if not report.decisions:
        return ""
    found = reasons(report.decisions)
    refused = sum(len(reason.decisions) for reason in found)
    parts = [_note(f"{len(report.decisions) - refused} accepted, {refused} refused.")]
    if found:
        body = [
            [
                str(len(reason.decisions)),
                f"<code>{escape(reason.step)}</code>",
                escape(reason.why) + (' <span class="soft">and alike</span>' if reason.alike else ""),
                _places([f"{d.where}: {d.what}" for d in reason.decisions]),
            ]
            for reason in found
        ]
        parts.append(_table([("refused", True), ("pass", False), ("reason", False), ("where", False)], body))
    for step, decisions in Plan(report.decisions).by_pass().items():
        accepted = [d for d in decisions if d.accepted]
        if accepted:
            lines = "".join(
                f"<li><code>{escape(d.where)}</code> {escape(d.what)} ({escape(d.why)})</li>" for d in accepted
            )
            summary = f"<code>{escape(step)}</code> accepted {len(accepted)}"
            parts.append(f"<details><summary>{summary}</summary><ul>{lines}</ul></details>")
    return "".join(parts)


def _places(places: Sequence[str]) -> str:
    if len(places) == 1:
        return escape(places[0])
    items = "".join(f"<li>{escape(place)}</li>" for place in places)
    return f"<details><summary>{len(places)} places</summary><ul>{items}</ul></details>"


def _environment(report: Report) -> str:
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in report.environment.items())
    return f"<dl>{items}</dl>" if items else ""


# pictures


def _pictures(report: Report) -> str:
    found = _pictured(report)
    if not found or report.masks is None:
        return ""
    figures = "".join(_figure(row, report.masks[row.name]) for row in found)
    total = sum(row.name in report.masks for row in report.rows)
    which = "" if len(found) == total else f" {len(found)} of {total} masked weights, those with the most to remove."
    legend = (
        '<p class="legend"><i class="none"></i>no weight <i class="ramp"></i>some to all weights kept '
        '<i class="gone"></i>removed row or column</p>'
    )
    return (
        _note(f"Rows are output channels, columns input channels; a pixel is the density of a kernel or block.{which}")
        + f'{legend}<div class="figures">{figures}</div>'
    )


def _pictured(report: Report) -> list[Row]:
    """The weights with the most to see, in the model's order."""
    masks: Mapping[str, Tensor] = report.masks or {}
    fitting = [row for row in report.rows if row.name in masks and len(row.shape) >= 2]
    fitting = [row for row in fitting if tuple(masks[row.name].shape) == row.shape and 0 not in row.shape]
    seen = [row for row in fitting if row.density < 1 or not row.untouched]
    seen.sort(key=lambda row: -(row.params_before - row.params_after + (1 - row.density) * row.params_before))
    chosen = {row.name for row in seen[:_PICTURES]}
    return [row for row in fitting if row.name in chosen]


def _figure(row: Row, mask: Tensor) -> str:
    pixels = picture(mask, row.kept_rows, row.kept_columns)
    height, width = pixels.shape[:2]
    down, across = (min(_MAGNIFY, max(1, PIXELS // side)) for side in (height, width))
    alt = f"mask of {row.name}, {row.shape[0]} rows, {row.shape[1]} columns"
    return (
        f'<figure><img src="{data_uri(pixels)}" width="{width * across}" height="{height * down}" '
        f'alt="{escape(alt)}"><figcaption><code>{_breakable(row.name.removesuffix(".weight"))}</code>'
        f"<small>{_shape(row)}<br>density {row.density:.2f}</small></figcaption></figure>"
    )
