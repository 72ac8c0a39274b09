"""Shows on standard error which step the library is at."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status
from rich.text import Text


@contextmanager
def progress() -> Iterator[None]:
    """Show what the logger "fxsparse" says: the latest step in a status line on a terminal, elsewhere one line each."""
    logger = logging.getLogger("fxsparse")
    console = Console(stderr=True)
    handler: logging.Handler = _StatusLine(console) if console.is_terminal else _Lines()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


class _Lines(logging.Handler):
    """`   3.2 s  capture`, to be read in a log."""

    def __init__(self) -> None:
        super().__init__()
        self.started_s = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{time.monotonic() - self.started_s:6.1f} s  {record.getMessage()}", file=sys.stderr, flush=True)


class _StatusLine(logging.Handler):
    """A spinner with the latest step; warnings stay on the screen above it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.status = Status("", console=console)

    def emit(self, record: logging.LogRecord) -> None:
        step = Text(record.getMessage())
        if record.levelno >= logging.WARNING:
            self.console.print(step)
        elif step.plain.startswith(("measure", "time ")):
            # The spinner is a thread that wakes twelve times a second: it would take time from what is timed.
            self.status.stop()
            self.console.print(step, style="dim")
        else:
            self.status.update(step)
            self.status.start()

    def close(self) -> None:
        self.status.stop()
        super().close()
