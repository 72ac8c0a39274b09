"""What a pass did, or would not do, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

OUTPUT = "output of the model"  # `where` of the one decision that is about all of it


@dataclass(frozen=True)
class Decision:
    """One thing a pass did, or would not do.

    step      the pass: its file's name
    where     module path or parameter name, as the user wrote it
    what      what is done, or would have been: "remove 31 of 128 rows"
    why       one sentence; for a refusal, the first thing that stopped it
    accepted  False for a refusal
    data      what `apply` needs; never shown
    """

    step: str
    where: str
    what: str
    why: str
    accepted: bool = True
    data: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        verb = "" if self.accepted else "not: "
        return f"{self.step}: {self.where}: {verb}{self.what} ({self.why})"


@dataclass(frozen=True)
class Plan:
    """The decisions of a run, in order."""

    decisions: tuple[Decision, ...] = ()

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __add__(self, more: Plan) -> Plan:
        return Plan(self.decisions + more.decisions)

    @property
    def accepted(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.accepted)

    @property
    def refused(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if not d.accepted)

    def by_pass(self) -> dict[str, list[Decision]]:
        """Decisions grouped by the pass that took them, in the order the passes ran."""
        groups: dict[str, list[Decision]] = {}
        for d in self.decisions:
            groups.setdefault(d.step, []).append(d)
        return groups
