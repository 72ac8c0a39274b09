"""Running passes: plan, carry out what was accepted, propagate shapes, tell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import ModuleType

from torch import fx

from fxsparse.ir.decision import Plan
from fxsparse.ir.graph import erase_unused, refresh
from fxsparse.passes.context import Context

log = logging.getLogger("fxsparse")


def name_of(step: ModuleType) -> str:
    """A pass is called what its file is called."""
    return step.__name__.rsplit(".", 1)[-1]


def run(
    gm: fx.GraphModule,
    steps: Iterable[ModuleType],
    ctx: Context,
    after: Callable[[ModuleType], None] = lambda step: None,
) -> Plan:
    """Run `steps` on `gm` in place; `after` is called with each pass that changed something."""
    plan = Plan()
    for step in steps:
        log.info("%s", name_of(step))
        found = Plan(tuple(step.plan(gm, ctx)))
        for decision in found.accepted:
            step.apply(gm, decision)
        if found.accepted:
            erase_unused(gm)
            gm.graph.lint()
            refresh(gm)
            after(step)
        plan += found
    return plan
