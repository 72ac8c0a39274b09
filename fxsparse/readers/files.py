"""Tensors from a file or folder, without running anything that is in it."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fxsparse.errors import MaskError, first_line, near
from fxsparse.ir.files import as_path, is_safetensors

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts put the state dict
_KEEP = "fxsparse.Masks(...).save(path) writes masks, torch.save(model.state_dict(), path) a checkpoint."


def load(path: str | os.PathLike[str]) -> Mapping[str, object]:
    """The dict in a .safetensors file, in one saved by torch.save, or in all .safetensors files of a folder.

    A state dict inside of a training checkpoint is taken out of it. Raises MaskError when there is nothing to read,
    when it is damaged, and when it holds more than tensors and containers: then it could run code.
    """
    given = as_path(path, "masks or a checkpoint")
    where = f"masks file {os.fspath(path)!r}"
    try:
        found = _folder(given, where) if given.is_dir() else stored(given)
    except MaskError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise anything
        raise MaskError(
            where, expected="a readable .safetensors file, or a state dict or masks saved by torch.save",
            got=failure(error), do=_advice(error, given),
        ) from None  # fmt: skip
    if not isinstance(found, Mapping) or not found or not all(isinstance(key, str) for key in found):
        raise MaskError(where, expected="tensors by name", got=f"a {type(found).__name__} without names", do=_KEEP)
    return unwrapped(found)


def stored(path: Path) -> object:
    """What a file of safetensors, under whatever name, or of torch.save holds. What they raise passes through."""
    if path.suffix == ".safetensors" or is_safetensors(path):
        return load_file(path)
    loaded: object = torch.load(path, "cpu", weights_only=True)
    return loaded


def _folder(path: Path, where: str) -> dict[str, Tensor]:
    """A model as the Hugging Face hub keeps it: one file, or several that share the tensors out."""
    files = sorted(path.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for part in map(load_file, files):
        twice = found.keys() & part.keys()
        if twice:
            raise MaskError(where, expected="each tensor in one of its files", got=f"{min(twice)!r} in two of them",
                            do="Name the one file to read.")  # fmt: skip
        found |= part
    if not files:
        raise MaskError(where, expected="a folder with .safetensors files", got="none in it",
                        do="Name the file itself.")  # fmt: skip
    return found


def unwrapped(found: Mapping[str, object]) -> Mapping[str, object]:
    """The state dict inside of a training checkpoint; `found` itself where there is none, or more than one."""
    inside = [found[key] for key in _WRAPPERS if are_tensors(found.get(key))]
    only: object = inside[0] if len(inside) == 1 else None
    return only if are_tensors(only) else found


def are_tensors(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether it is a dict of tensors, and not empty."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def failure(error: Exception) -> str:
    """What a file is, by the error of `stored`. Of what is no pickle at all, unpickling says KeyError: 101."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, (OSError, RuntimeError, SafetensorError)):
        return first_line(error)
    named = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return f"a pickle of {named[1]}, which could run code" if named else "no checkpoint, or a damaged one"


def _advice(error: Exception, path: Path) -> str:
    if isinstance(error, FileNotFoundError) and path.parent.is_dir():
        return near(path.name, os.listdir(path.parent)) or f"It was looked for in {path.parent.resolve()}."
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL fxsparse." in str(error):
        return "Save masks with masks.save(path): that file holds tensors alone."
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return (
            "A whole pickled model is not read. Load it where you trust it and save its state dict. "
            "One of Torch-Pruning has no masks, its channels are gone: compile the model itself."
        )
    return f"Write it again: {_KEEP} Pickles of anything else are not read: they can run code."
