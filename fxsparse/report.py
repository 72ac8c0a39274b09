"""What a run did to every weight, why, and what it gained: the data, and the words that its text and its page share."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxsparse.ir.decision import OUTPUT, Decision
from fxsparse.ir.masks import Masks


@dataclass(frozen=True)
class Row:
    """One weight that a convolution or linear reads: its size before and after, and why no more was removed.

    density       kept weights / all, by the mask and the zeros
    kept_for      why dead rows or columns stay: "rounding (5 rows)"
    blocked_by    the first op that stopped removal, or None
    macs_*        for one sample
    *_us          this layer alone; None when it was not timed
    kept_rows     indices that stay, for the pictures; None when not recorded
    stored        "dense", or the sparse format that was chosen; params_after and macs_after then count its blocks
    dense_for     why a weight that has zeros is stored dense all the same; empty for all others
    """

    name: str
    op: str
    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    density: float
    rows_removed: int
    columns_removed: int
    kept_for: tuple[str, ...]
    blocked_by: str | None
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    dense_us: float | None = None
    sparse_us: float | None = None
    kept_rows: tuple[int, ...] | None = None
    kept_columns: tuple[int, ...] | None = None
    stored: str = "dense"
    dense_for: str = ""

    @property
    def untouched(self) -> bool:
        """Nothing was removed, nothing dead was kept and nothing stood in the way."""
        removed = self.rows_removed or self.columns_removed or self.params_after != self.params_before
        return not (removed or self.kept_for or self.blocked_by or self.dense_for)


@dataclass(frozen=True)
class Timing:
    """One build, timed in interleaved pairs with the others: median, 20th and 80th percentile of `runs` runs.

    together  in all rounds that the speedup is of; else the machine may have been faster or slower
    """

    build: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int
    together: bool = True


@dataclass(frozen=True)
class Report:
    """The decisions of a run and what they gained. `str()` is a table, `to_dict()` JSON, `to_html()` a page.

    dense_ms, sparse_ms    medians of the best dense build, the fastest of those timed together with ours, and of ours;
                           None when not measured
    speedup_median         of the ratio dense / sparse within a round
    speedup_low, _high     its 20th and 80th percentile
    chosen                 "sparse"; "dense" when the rewritten build was slower; "not measured" for a dry run
    environment            torch, python, cpu, threads, date, shapes: what the numbers depend on
    masks                  for the pictures of `to_html`; not part of the JSON
    """

    target: str
    decisions: tuple[Decision, ...]
    rows: tuple[Row, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    timings: tuple[Timing, ...] = ()
    dense_ms: float | None = None
    sparse_ms: float | None = None
    speedup_low: float | None = None
    speedup_median: float | None = None
    speedup_high: float | None = None
    verification: str = ""
    chosen: str = "sparse"
    environment: Mapping[str, str] = field(default_factory=dict)
    masks: Masks | None = field(default=None, repr=False, compare=False)

    @property
    def speedup(self) -> float | None:
        """The median ratio within a round; of the two medians where that is not known, None when not measured."""
        if self.speedup_median is not None:
            return self.speedup_median
        return self.dense_ms / self.sparse_ms if self.dense_ms is not None and self.sparse_ms else None

    @property
    def warning(self) -> str:
        """That the masks leave a network whose output is always the same; empty for all others."""
        why = next((d.why for d in self.decisions if d.where == OUTPUT), "")
        return why and f"The output does not depend on the input: {why}. In a mask, True means kept."

    @property
    def verdict(self) -> str:
        """What is returned to the user and why, in one sentence."""
        if self.chosen == "not measured":
            return "Not measured: a dry run builds nothing and times nothing."
        speed = _speed(self)
        if self.chosen == "dense":
            slower = "slower" if self.speedup is None or self.speedup < 1 else "no faster"
            return f"The dense build is returned: the rewritten one was measured {slower}{speed and f', {speed}'}."
        return f"The rewritten build is returned{speed and f': {speed}'}."

    def __str__(self) -> str:
        from fxsparse.report_text import text  # here, because the text is made of this module's data

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the fields' own names, for `json.dumps`. Masks and the decisions' data are left out."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "masks"}
        return {**plain, "speedup": self.speedup, "verdict": self.verdict}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], masks: Masks | None = None) -> Report:
        """The report that `to_dict` made `plain` of. Raises TypeError or KeyError for anything else."""
        fields = {key: value for key, value in plain.items() if key not in ("speedup", "verdict")}
        for name, kind in (("decisions", Decision), ("rows", Row), ("timings", Timing)):
            fields[name] = tuple(kind(**_with_tuples(item)) for item in plain[name])
        return cls(**fields, masks=masks)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page, whole or not at all; missing folders are made.

        Raises InputError when `path` is a folder, or lies below something that is not one.
        """
        from fxsparse.report_html import write_page  # here, because the page is made of this module's data

        write_page(self, path)


@dataclass(frozen=True)
class Reason:
    """Refusals of one pass that differ only in numbers: `why` is the first one's."""

    step: str
    why: str
    decisions: tuple[Decision, ...]

    @property
    def alike(self) -> bool:
        """Their sentences are not all the same."""
        return any(d.why != self.why for d in self.decisions)


def reasons(decisions: Iterable[Decision]) -> list[Reason]:
    """The refusals grouped by pass and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for d in decisions:
        if not d.accepted:
            groups.setdefault((d.step, re.sub(r"\d+", "#", d.why)), []).append(d)
    found = [Reason(step, group[0].why, tuple(group)) for (step, _), group in groups.items()]
    return sorted(found, key=lambda reason: -len(reason.decisions))


def accepted_by_pass(decisions: Iterable[Decision]) -> dict[str, int]:
    """How many decisions each pass took and carried out, in the order the passes ran."""
    return dict(Counter(d.step for d in decisions if d.accepted))


def count(n: float) -> str:
    """Three significant digits and a unit: 11689512 is 11.7M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= 0.9995 * size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def duration(value: float | None) -> str:
    """Three significant digits, never in powers of ten: 1234.5 is 1234, 1.2345 is 1.23. Empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def format_name(stored: str) -> str:
    """A format as it is written in tables: "shuffled block", "n:m"."""
    return "n:m" if stored == "n_m" else stored.replace("_", " ")


def stored_as(row: Row) -> str:
    """Its format as it is written in tables, and by its true name where the format keeps everything or nothing."""
    if row.stored == "dense" or 0 < row.params_after < math.prod(row.new_shape):
        return format_name(row.stored)
    return "one dense block" if row.params_after else "nothing"


def percent(after: float, before: float) -> str:
    """What is left: 45%; never 0% or 100% when it is not exactly that. Empty when there was nothing."""
    if not before:
        return ""
    share = round(100 * after / before)
    if share == 0 and after:
        return "<1%"
    return ">99%" if share == 100 and after < before else f"{share}%"


def shape_change(row: Row) -> str:
    """`512x512x3x3 -> 390x411`; the kernel is written once when it stays, everything once when nothing changed."""
    if row.new_shape == row.shape:
        return _by(row.shape)
    new = row.new_shape[:2] if row.new_shape[2:] == row.shape[2:] else row.new_shape
    return f"{_by(row.shape)} -> {_by(new)}"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _plain(value: Any) -> Any:
    if isinstance(value, Decision):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "data"}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def elsewhen(timings: Iterable[Timing]) -> str:
    """What the star behind a build's name says; empty where none has one."""
    if all(timing.together for timing in timings):
        return ""
    return "* not timed in all rounds of ours: the machine may have been faster or slower then"


def _speed(report: Report) -> str:
    if report.speedup is None:
        return ""
    text = f"{report.speedup:.2f} times the speed of the best dense build"
    if report.speedup_low is None or report.speedup_high is None:
        return text
    return f"{text} ({report.speedup_low:.2f} to {report.speedup_high:.2f} in pairs)"
