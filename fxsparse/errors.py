"""The errors users meet. Each says where, what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxSparseError(Exception):
    """Base of every error fxsparse raises on purpose.

    where     the user's own object: a parameter name, an argument, a file
    expected  what would have been accepted
    got       what came instead
    do        the way out, one or two sentences
    """

    def __init__(self, where: str, *, expected: str, got: str, do: str) -> None:
        super().__init__(f"{where}: expected {expected}; got {got}.\n  {do}")
        self.where, self.expected, self.got, self.do = where, expected, got, do

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the four parts: the keyword arguments would be lost by Exception's own pickling."""
        return _rebuild, (type(self), self.where, self.expected, self.got, self.do)


class MaskError(FxSparseError):
    """A mask that does not fit the model: unknown name, wrong shape, dtype or values."""


class CaptureError(FxSparseError):
    """A model or inputs that torch.export cannot turn into a graph."""


class InputError(FxSparseError):
    """An argument, or an input at call time, that does not fit."""


class PackageError(FxSparseError):
    """A saved package that is damaged, not one of ours, or asks for what this installation does not have."""


class TargetError(FxSparseError):
    """A target that is unknown, or that this machine cannot run."""


class VerificationError(FxSparseError):
    """The rewritten graph does not compute what the masked model computes."""


def _rebuild(kind: type[FxSparseError], where: str, expected: str, got: str, do: str) -> FxSparseError:
    return kind(where, expected=expected, got=got, do=do)


def first_line(error: BaseException) -> str:
    """`ValueError: too deep`: the kind of someone else's error, and the first line it says, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *(line[:300].rstrip(".") for line in lines[:1])])


def near(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'a' or 'b'?`, or an empty string when nothing is near."""
    names = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(n) for n in names)}?" if names else ""
