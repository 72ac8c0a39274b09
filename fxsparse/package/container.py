"""The file: safetensors, with JSON and hashes in its metadata.

    metadata.format     "fxsparse package", so that other safetensors files are recognized as such
    metadata.version    of this layout; only an equal one is read
    metadata.fxsparse, metadata.torch   what wrote it
    metadata.content    JSON
    metadata.members    JSON: sha256 of every tensor, its dtype and shape included
    metadata.sha256     of all of the above

safetensors is a header with names, dtypes, shapes and offsets, then the bytes: its reader runs nothing, and refuses
headers that promise more than the file holds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxsparse.errors import PackageError
from fxsparse.ir.files import as_path, is_safetensors, replacing

FORMAT, VERSION = "fxsparse package", "1"
_AGAIN = "Save it again, or copy it again from where it is whole."
_KNOWN = {
    b"PK\x03\x04": "a zip archive; torch.save files and AOTInductor packages are, and they can run code",
    b"\x80": "a pickle, which can run code",
    b"\x7fELF": "a compiled library",
}


def write(path: str | os.PathLike[str], content: Mapping[str, Any], tensors: Mapping[str, Tensor], writer: str) -> None:
    """Write a package, whole or not at all. `writer` is the version of fxsparse. An OSError passes through."""
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {
        "format": FORMAT, "version": VERSION, "fxsparse": writer, "torch": torch.__version__,
        "content": json.dumps(content), "members": json.dumps({name: _digest(t) for name, t in stored.items()}),
    }  # fmt: skip
    metadata["sha256"] = _whole(metadata)
    with replacing(path) as name:
        try:
            save_file(stored, name, metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from None


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor], Mapping[str, str]]:
    """Content, tensors (copies: later writes to the file do not reach them) and metadata.

    Raises PackageError for a file that is missing, damaged, foreign, or of another version.
    """
    file_path = as_path(path, "a package")
    where = f"package {os.fspath(path)!r}"
    try:
        if not stat.S_ISREG(file_path.stat().st_mode):
            raise _damaged(where, "not a regular file")
        with _held(file_path) as same:
            _check_kind(where, same)
            with safe_open(same, "pt") as file:
                metadata = file.metadata() or {}
                _check_metadata(where, metadata)
                members = json.loads(metadata["members"])
                if set(file.keys()) != set(members):
                    raise _damaged(where, "other tensors than it lists")
                tensors = {name: file.get_tensor(name).clone() for name in members}
        for name, tensor in tensors.items():
            if _digest(tensor) != members[name]:
                raise _damaged(where, f"tensor {name!r} with another hash")
        return json.loads(metadata["content"]), tensors, metadata
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = str(error.strerror if isinstance(error, OSError) and error.strerror else error).splitlines() or [""]
        raise _damaged(where, f"{type(error).__name__}: {got[0][:200]}") from None


@contextlib.contextmanager
def _held(path: Path) -> Iterator[Path]:
    """A name of this very file while it is read: safetensors opens it twice, and `path` may be replaced in between."""
    with path.open("rb") as file:
        same = Path(f"/proc/self/fd/{file.fileno()}")
        yield same if same.exists() else path


def _check_kind(where: str, path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(4)
    for magic, kind in _KNOWN.items():
        if first.startswith(magic) and not (len(magic) == 1 and is_safetensors(path)):
            raise PackageError(where, expected="a file that SparseModule.save wrote", got=kind,
                               do="A .pt2 of save_aoti is loaded by torch._inductor.aoti_load_package.")  # fmt: skip


def _check_metadata(where: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise PackageError(where, expected="a file that SparseModule.save wrote",
                           got="a safetensors file of another kind",
                           do="Masks are read by Masks.load, weights by safetensors.torch.load_file.")  # fmt: skip
    if metadata.get("version") != VERSION:
        raise PackageError(
            where, expected=f"format version {VERSION}", got=f"{metadata.get('version')!r}, written by fxsparse "
            f"{metadata.get('fxsparse')}", do="Install that fxsparse, or compile the model again with this one.",
        )  # fmt: skip
    if metadata.get("sha256") != _whole(metadata):
        raise _damaged(where, "a header with another hash")


def _digest(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        flat = tensor.reshape(-1)  # one element counts as contiguous with any stride
        flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
        found.update(cast(Any, flat.view(torch.uint8).numpy()))
    return found.hexdigest()


def _whole(metadata: Mapping[str, str]) -> str:
    parts = sorted((key, value) for key, value in metadata.items() if key != "sha256")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _damaged(where: str, got: str) -> PackageError:
    return PackageError(where, expected="a whole file that SparseModule.save wrote", got=got, do=_AGAIN)
