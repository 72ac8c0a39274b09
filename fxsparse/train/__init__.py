"""Training with masks: loops that find them and contexts that keep them."""

from __future__ import annotations

from fxsparse.train.imp import Ticket, imp
from fxsparse.train.masked import masked

__all__ = ["Ticket", "imp", "masked"]
