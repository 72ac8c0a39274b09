"""How a sparse weight is stored and multiplied. Every module in this folder is imported; a format is one file."""

from __future__ import annotations

import importlib
import pkgutil

from fxsparse.formats.format import Format, Standard

__all__ = ["BY_OPERATOR", "FORMATS", "KERNELS", "Format", "Standard"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _kinds(base: type[Format]) -> list[type[Format]]:
    return [kind for below in base.__subclasses__() for kind in (below, *_kinds(below))]


# Formats with kernels of ours or of PyTorch's, by the kind of device.
KERNELS = {"cpu": ("shuffled_block", "unstructured", "n_m"), "cuda": ("shuffled_block", "n_m")}
FORMATS: dict[str, Format] = {kind.name: kind() for kind in _kinds(Format)}
BY_OPERATOR = {form.operator: form for form in reversed(FORMATS.values()) if form.operator is not None}
