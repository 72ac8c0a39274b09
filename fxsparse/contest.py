"""Never slower: the rewritten build against the best dense build, in turns; the faster one is returned."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxsparse.backend import TARGETS, Target, find_target
from fxsparse.backend.target import Runnable
from fxsparse.errors import FxSparseError, TargetError, first_line
from fxsparse.ir.decision import Decision
from fxsparse.ir.graph import clone, get_tensor, is_ours, on_gpu, set_tensor
from fxsparse.ir.inputs import Prepare, as_is, channels_last, inputs_channels_last
from fxsparse.measure import NEAR_TIE, Runs, play_off, settled
from fxsparse.report import Timing

log = logging.getLogger("fxsparse")


@dataclass
class _Build:
    name: str
    gm: fx.GraphModule
    run: Runnable
    prepare: Prepare
    target: Target
    rewritten: fx.GraphModule | None = None  # the graph that it came from; None for a dense build


@dataclass
class Contest:
    """The build to return, and the timings that chose it (none when nothing was measured).

    sparse     the rewritten graph, of those given, that ran fastest; `gm` is it, or it in another memory format, unless
               a dense build is returned
    any_size   whether `run` takes other sizes too
    decisions  what the target itself decided about that one
    ratio      dense_ms / sparse_ms within a round: the 20th percentile, the median, the 80th percentile
    """

    gm: fx.GraphModule
    run: Runnable
    prepare: Prepare
    target: Target
    chosen: str
    sparse: fx.GraphModule
    any_size: bool
    timings: tuple[Timing, ...] = ()
    decisions: tuple[Decision, ...] = ()
    dense_ms: float | None = None
    sparse_ms: float | None = None
    ratio: tuple[float | None, float | None, float | None] = field(default=(None, None, None))

    def after(self, refused: Target, error: FxSparseError) -> Contest:
        """With the decision that `refused`, which had won before, computes something else."""
        return dataclasses.replace(self, decisions=(_left_out(refused.name, f"it gives {error.got}"), *self.decisions))

    def for_report(self) -> dict[str, Any]:
        """The fields of a Report that come from here."""
        return {
            "chosen": self.chosen, "timings": self.timings, "dense_ms": self.dense_ms, "sparse_ms": self.sparse_ms,
            "speedup_low": self.ratio[0], "speedup_median": self.ratio[1], "speedup_high": self.ratio[2],
        }  # fmt: skip


def contest(
    dense: fx.GraphModule,
    sparse: fx.GraphModule,
    inputs: Sequence[Any],
    target: Target,
    *,
    measure: bool,
    also: Mapping[str, fx.GraphModule] | None = None,
    any_size: bool = False,
) -> Contest:
    """Lower `sparse`; with `measure` also every dense build, time them, and pick the fastest.

    also      other rewritten graphs that compete, by what tells them apart; only with `measure`
    any_size  make code for any size at once, and compare that: the sizes of `inputs` will hardly come again
    """
    runners, decisions = _runners(target, any_size, on_gpu(dense))
    if not measure:
        own = next(_own_builds(runners[0], {"": sparse}, inputs, any_size))
        return Contest(sparse, own.run, as_is, own.target, "sparse", sparse, any_size, decisions=_decisions(own))
    competing, refused = _competing(runners, {"": sparse, **(also or {})}, inputs, any_size)
    rivals = dense_builds(dense, inputs, target, any_size)
    ours, best, runs = _fastest(competing, rivals, inputs)
    stages = [runs]
    if not any_size and (refined := _refined(competing, rivals, runs, inputs)):
        ours, best, runs = _fastest([ours, refined[0]], [best, refined[1]], inputs)
        stages.append(runs)
    runs = settled(runs, best.name, ours.name, {b.name: _call(b, inputs) for b in (best, ours)})
    ratios = runs.ratios(best.name, ours.name)
    low, middle, high = (ratios[len(ratios) * tenths // 10] for tenths in (2, 5, 8))
    faster = middle >= 1.0
    won = ours if faster else best
    decisions += [*refused, *_ran(target, won), *_decisions(ours)]
    return Contest(
        won.gm, won.run, won.prepare, won.target, "sparse" if faster else "dense", ours.rewritten or ours.gm, any_size,
        _every_timing(stages, runs, ours.name), tuple(decisions), runs.median(best.name), runs.median(ours.name),
        (low, middle, high),
    )  # fmt: skip


def _runners(target: Target, any_size: bool, gpu: bool) -> tuple[list[Target], list[Decision]]:
    """What is to run the graphs: `target`, or those it stands for and that can, and why others cannot.

    A rival runs ours on a GPU only: on CPUs eager has been slower than Inductor with every model measured.
    """
    found, decisions = [], []
    for name in [n for n in target.runners if gpu or n not in target.rivals] or (target.name,):
        try:
            runner = find_target(name)
        except TargetError as error:
            decisions.append(_left_out(name, error.got))
            continue
        if any_size and runner.standard_operators and runner is not target:
            decisions.append(_left_out(name, "other sizes than the batch are open"))
        else:
            found.append(runner)
    return found, decisions


def _left_out(name: str, why: str) -> Decision:
    return Decision("contest", f"target {name!r}", "run the model", why, False)


def _ran(target: Target, won: _Build) -> list[Decision]:
    what, why = f"run it on {won.target.name!r}", f"{won.name} was measured fastest"
    return [Decision("contest", f"target {target.name!r}", what, why)] if target.runners else []


def _competing(
    runners: Sequence[Target], every: Mapping[str, fx.GraphModule], inputs: Sequence[Any], any_size: bool
) -> tuple[list[_Build], list[Decision]]:
    """The rewritten graphs on every runner, and why some cannot have them. Raises TargetError when none can."""
    builds: list[_Build] = []
    refused: list[tuple[Target, TargetError]] = []
    for runner in runners:
        try:
            builds += list(_own_builds(runner, _fitting(runner, runners, every), inputs, any_size))  # all or none
        except TargetError as error:
            refused.append((runner, error))
    if not builds:
        raise refused[0][1]
    return builds, [_left_out(runner.name, error.got) for runner, error in refused]


def _fitting(
    runner: Target, runners: Sequence[Target], every: Mapping[str, fx.GraphModule]
) -> Mapping[str, fx.GraphModule]:
    """The first graph; all, where formats are chosen by whole models; beside PyTorch none that is packed for it."""
    if not runner.standard_operators:
        return {label: gm for label, gm in every.items() if not label or on_gpu(gm)}
    unpacked = {label: gm for label, gm in every.items() if not any(map(is_ours, gm.graph.nodes))}
    return every if len(runners) == 1 else unpacked or every


def _own_builds(
    runner: Target, every: Mapping[str, fx.GraphModule], inputs: Sequence[Any], any_size: bool
) -> Iterator[_Build]:
    log.info("lower (%s)", runner.name)
    for label, rewritten in every.items():
        name = f"sparse: {runner.name}{label and f', {label}'}"
        if any_size:
            yield _Build(name, rewritten, runner.lower_dynamic(rewritten), as_is, runner, rewritten)
            continue
        layouts = _layouts(rewritten) if runner.keeps_layouts else {"contiguous": (rewritten, as_is)}
        for layout, (gm, prepare) in layouts.items():
            own = name if layout == "contiguous" else f"{name}, {layout}"
            yield _Build(own, gm, runner.lower(gm, prepare(inputs)), prepare, runner, rewritten)


def _layouts(gm: fx.GraphModule) -> dict[str, tuple[fx.GraphModule, Prepare]]:
    """The graph as it is, and where a weight has four dimensions in channels_last."""
    layouts: dict[str, tuple[fx.GraphModule, Prepare]] = {"contiguous": (gm, as_is)}
    if any(n.op == "get_attr" and get_tensor(gm, str(n.target)).dim() == 4 for n in gm.graph.nodes):
        layouts["channels_last"] = (_channels_last(gm), inputs_channels_last)
    return layouts


def _fastest(own: Sequence[_Build], rivals: Sequence[_Build], inputs: Sequence[Any]) -> tuple[_Build, _Build, Runs]:
    """The fastest of each, and their times."""
    log.info("measure")
    runs = play_off({b.name: _call(b, inputs) for b in own}, {b.name: _call(b, inputs) for b in rivals})
    first, second = (runs.fastest([b.name for b in builds]) for builds in (own, rivals))
    return next(b for b in own if b.name == first), next(b for b in rivals if b.name == second), runs


def _refined(
    own: Sequence[_Build], rivals: Sequence[_Build], runs: Runs, inputs: Sequence[Any]
) -> tuple[_Build, _Build] | None:
    """The fastest of each on one target, lowered by another that makes more of both; None where none is worthwhile.

    Both or neither: the rewritten graph must not win by what the dense one was not given.
    """

    def ms(build: _Build) -> float:
        return runs.median(build.name)

    for target in TARGETS.values():
        mine, theirs = ([b for b in builds if b.target.name == target.refines] for builds in (own, rivals))
        ours = min(mine, key=ms, default=None)
        if ours is None or not theirs or ms(ours) > NEAR_TIE * min(map(ms, own)):
            continue
        if target.worthwhile(ours.gm, ms(ours)):
            fastest = runs.fastest([b.name for b in theirs])  # of those timed longest: not by a few lucky rounds
            return _lowered_by(target, ours, next(b for b in theirs if b.name == fastest), inputs)
    return None


def _lowered_by(target: Target, ours: _Build, rival: _Build, inputs: Sequence[Any]) -> tuple[_Build, _Build] | None:
    log.info("lower (%s)", target.name)
    try:
        return _again(target, ours, inputs), _again(target, rival, inputs)
    except Exception as error:  # noqa: BLE001 - a compiler's failure, and what it should have improved on works
        log.warning("target %r could not lower it: %s", target.name, first_line(error))
        return None


def _again(target: Target, build: _Build, inputs: Sequence[Any]) -> _Build:
    run = target.lower(build.gm, build.prepare(inputs))
    name = build.name.replace(build.target.name, target.name)
    return dataclasses.replace(build, name=name, run=run, target=target)


def dense_builds(dense: fx.GraphModule, inputs: Sequence[Any], target: Target, any_size: bool = False) -> list[_Build]:
    """The masked model, not rewritten: on the target and its rivals, contiguous and channels_last."""
    runners = _runners(target, any_size, on_gpu(dense))[0]
    targets = [TARGETS[name] for name in target.rivals if TARGETS[name] not in runners] + runners
    builds, layouts = [], _layouts(dense)
    for t in targets:
        for name, (gm, prepare) in layouts.items():
            if name not in t.memory_formats:
                continue
            log.info("lower dense (%s, %s)", t.name, name)
            try:
                if any_size:  # the inputs' memory format is part of the graph's shapes
                    builds.append(_Build(f"{t.name}, {name}", gm, t.lower_dynamic(gm), as_is, t))
                else:
                    builds.append(_Build(f"{t.name}, {name}", gm, t.lower_dense(gm, prepare(inputs)), prepare, t))
            except TargetError:  # the rewritten graph has met it before, and that is in the report
                if t not in runners or len(runners) == 1:
                    raise
    return builds


def _call(build: _Build, inputs: Sequence[Any]) -> Callable[[], object]:
    """A run of `build`. A dense one gets the memory format that it likes for nothing, ours does not."""
    prepare, prepared = build.prepare, inputs
    if build.rewritten is None:
        prepare, prepared = as_is, build.prepare(inputs)

    def run() -> object:
        with torch.no_grad():
            return build.run(*prepare(prepared))

    return run


def _decisions(build: _Build) -> tuple[Decision, ...]:
    return tuple(getattr(build.run, "decisions", ()))


def _every_timing(stages: Sequence[Runs], last: Runs, ours: str) -> tuple[Timing, ...]:
    """A row for each build: of the last rounds, in which `ours` ran, or else of the stage that timed it longest.

    A machine's speed changes from one stage to the next: rows of two stages are not merged, and not compared.
    """
    rounds = len(last.ms[ours])
    found = {name: ms for name, ms in last.ms.items() if len(ms) == rounds}
    names = dict.fromkeys(name for runs in stages for name in runs.ms)
    longest = {name: max((runs.ms.get(name, ()) for runs in stages), key=len) for name in names}
    rows = timings(Runs({**longest, **found}))
    return tuple(dataclasses.replace(row, together=row.build in found) for row in rows)


def timings(runs: Runs) -> tuple[Timing, ...]:
    """A row for each build that was timed."""
    return tuple(
        Timing(name, runs.median(name), runs.quantile(name, 0.2), runs.quantile(name, 0.8), len(ms))
        for name, ms in runs.ms.items()
    )


def _channels_last(gm: fx.GraphModule) -> fx.GraphModule:
    copy = clone(gm)
    for target in {str(n.target) for n in copy.graph.nodes if n.op == "get_attr"}:
        set_tensor(copy, target, channels_last(get_tensor(copy, target)))
    return copy
