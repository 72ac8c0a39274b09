"""What runs the result. Every module in this folder is imported; a target is one file, and no list is edited."""

from __future__ import annotations

import importlib
import pkgutil

from fxsparse.backend.target import Target
from fxsparse.errors import TargetError, near

__all__ = ["TARGETS", "Target", "find_target", "for_all_sizes"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _kinds(kind: type[Target]) -> list[type[Target]]:
    return [found for sub in kind.__subclasses__() for found in (sub, *_kinds(sub))]


TARGETS: dict[str, Target] = {kind.name: kind() for kind in _kinds(Target)}


def for_all_sizes(chosen: Target, lowered_by: Target | None) -> Target:
    """What runs other sizes than the example's: the user's target, or what won where that serves all of them."""
    return lowered_by if lowered_by is not None and lowered_by.one_for_all_sizes else chosen


def find_target(name: str) -> Target:
    """The target called `name`. Raises TargetError when it is unknown or cannot run on this machine."""
    if name not in TARGETS:
        known = ", ".join(repr(n) for n in sorted(TARGETS))
        do = _device(str(name)) or near(str(name), TARGETS) or "Pass target='inductor', the default."
        raise TargetError(f"target {name!r}", expected=f"one of {known}", got="an unknown name", do=do)
    TARGETS[name].require()
    return TARGETS[name]


def _device(name: str) -> str:
    """The advice for who names a GPU."""
    gpu = name.lower().partition(":")[0] in ("gpu", "cuda", "nvidia")
    return "A GPU is no target: it is chosen by model.cuda(), with inputs that are there too." if gpu else ""
