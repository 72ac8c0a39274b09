"""How a sparse weight is stored and multiplied. Every module in this folder is imported; a format is one file."""

from __future__ import annotations

import importlib
import pkgutil

from fxsparse.formats.format import Format, Standard

__all__ = ["BY_OPERATOR", "FORMATS", "Format", "Standard"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

FORMATS: dict[str, Format] = {kind.name: kind() for kind in Format.__subclasses__()}
BY_OPERATOR = {form.operator: form for form in FORMATS.values() if form.operator is not None}
