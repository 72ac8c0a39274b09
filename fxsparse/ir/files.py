"""Files that are written whole or not at all, and paths that are none."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxsparse.errors import InputError


def as_path(path: object, what: str) -> Path:
    """`path` as a Path. Raises InputError for what names no file, whatever the system would say to it."""
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]
    except TypeError:
        text = ""
    if not text or "\0" in text:
        raise InputError(f"path of {what}", expected="a str or os.PathLike", got=repr(path), do="Name a file.")
    return Path(text)


def obstacle(path: Path) -> str:
    """What stands where a file is to be written and is none; empty when nothing does."""
    return "a folder" if path.is_dir() else "something that is no file" if path.exists() and not path.is_file() else ""


def is_safetensors(path: Path) -> bool:
    """Whether it begins as they do: the length of a header, little endian in 8 bytes, and a header of JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def writable(path: object, like: str) -> Path:
    """`path`, if a file can be written there: found out before the minutes of work rather than after. Makes the folder.

    like  what such a file may be called, for the advice
    Raises InputError otherwise.
    """
    target = as_path(path, "a file to write")
    where = f"output file {str(target)!r}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise InputError(
            where, expected="a path in a folder that exists or can be made, and written to",
            got=f"{type(error).__name__}: {error.strerror}", do="Name another file.",
        ) from None  # fmt: skip
    if problem := obstacle(target):
        do = f"{target / like}, say." if target.is_dir() else "Name another file."
        raise InputError(where, expected="a file", got=problem, do=do)
    return target


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed when all went well, removed when not. Makes the folder.

    Processes that write at once leave one whole file. A symbolic link stays, what it names is replaced; anything else
    that is no file is left alone. Whoever may read new files may read it. An OSError of the system passes through.
    """
    target = Path(os.path.realpath(as_path(path, "a file to write")))
    if problem := obstacle(target):  # renaming over /dev/null would take it from everybody
        raise OSError(errno.EINVAL, f"there is {problem}", str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the renaming is atomic; the suffix stays, as some writers look at it
    temporary = target.with_name(f".{secrets.token_hex(6)}.{target.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode | temporary.stat().st_mode)  # safetensors makes a file that only its owner can read
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an OSError of the system becomes an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        got = f"{type(error).__name__}: {error.strerror}"
        raise InputError(f"output file {os.fspath(path)!r}", expected="a path that can be written", got=got,
                         do="Name another file.") from None  # fmt: skip


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`replacing`, with the error of `writing`."""
    with writing(path), replacing(path) as name:
        yield name
