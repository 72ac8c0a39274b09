"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed when all went well, removed when not. Makes the folder.

    Processes that write at once leave one whole file. An OSError of the system passes through.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the renaming is atomic; the suffix stays, as some writers look at it
    temporary = target.with_name(f".{secrets.token_hex(6)}.{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
