"""Numbers that a method of training was given."""

from __future__ import annotations

from fxsparse.errors import InputError


def check_ranges(*rows: tuple[str, object, bool, str, str]) -> None:
    """Each row is where, the value, whether it fits, what was expected, what to do. InputError for the first misfit."""
    for where, value, fits, expected, do in rows:
        if not fits:
            raise InputError(where, expected=expected, got=repr(value), do=do)
