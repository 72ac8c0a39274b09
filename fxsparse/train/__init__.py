"""Training with masks: loops that find them, and contexts that keep them or change them on the way."""

from __future__ import annotations

from fxsparse.train.dsb import dsb
from fxsparse.train.imp import Ticket, imp
from fxsparse.train.masked import Training, masked
from fxsparse.train.rigl import rigl
from fxsparse.train.sr_ste import sr_ste
from fxsparse.train.top_kast import top_kast

__all__ = ["Ticket", "Training", "dsb", "imp", "masked", "rigl", "sr_ste", "top_kast"]
