"""Operators that are more than running them on taint. Every module in this folder is imported; no list is edited."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "registry":  # it collects what the others define
        importlib.import_module(f"{__name__}.{_module.name}")

from fxsparse.rules.registry import RULES, collect, rule_of  # noqa: E402 - after the rules
from fxsparse.rules.rule import Rule, Sample  # noqa: E402

__all__ = ["RULES", "Rule", "Sample", "collect", "rule_of"]
