"""Exactly those words of torch's that our errors say better, or that tell the user nothing: left out while it works."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

# By logger, how the message begins. Said of whatever an error of ours is about to name, in twenty lines.
_FAILURES = {
    "torch._subclasses.fake_tensor": "failed while attempting to run meta for",
    "torch.fx.experimental.symbolic_shapes": "Unable to find user code corresponding to",
}
_NO_GPU = {"torch.utils.cpp_extension": "No CUDA runtime is found, using CUDA_HOME="}  # when Inductor imports it
# The result has its own copies without gradients, and the model gets its attributes back (`capture`).
_TRACING = (
    threading.RLock()
)  # filters of warnings and torch's print are the process's: one thread at a time puts them back
_ATTRIBUTES = ("The tensor attributes? self", r"A model attribute `.*` requires gradient")


@contextlib.contextmanager
def tracing_quietly() -> Iterator[None]:
    """For torch.export: its failures become our errors."""
    with _TRACING, warnings.catch_warnings(), _without(_FAILURES), _without_graphs():
        for text in _ATTRIBUTES:
            warnings.filterwarnings("ignore", text, UserWarning)
        yield


@contextlib.contextmanager
def compiling_quietly() -> Iterator[None]:
    """For Inductor: that a machine has no GPU is no news when it compiles for a CPU."""
    with _without(_NO_GPU):
        yield


@contextlib.contextmanager
def _without(said: dict[str, str]) -> Iterator[None]:
    filters = [(logging.getLogger(name), _Not(text)) for name, text in said.items()]
    for logger, left_out in filters:
        logger.addFilter(left_out)
    try:
        yield
    finally:
        for logger, left_out in filters:
            logger.removeFilter(left_out)


class _Not(logging.Filter):
    """Drops messages that begin so."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.name)


@contextlib.contextmanager
def _without_graphs() -> Iterator[None]:
    """torch.export prints the graph that it had when it failed; it has no setting for that."""
    import torch.export._trace  # here: it takes seconds, and whoever only loads a package needs none of it

    names = vars(torch.export._trace)
    outer = names.get("print")
    names["print"] = lambda *_, **__: None
    try:
        yield
    finally:
        if outer is None:
            del names["print"]
        else:
            names["print"] = outer
