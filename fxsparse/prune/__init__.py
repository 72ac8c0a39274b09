"""First masks: which weights to keep. Every function returns masks and leaves the model as it is."""

from __future__ import annotations

from fxsparse.prune.magnitude import magnitude
from fxsparse.prune.prunable import prunable
from fxsparse.prune.random import random

__all__ = ["magnitude", "prunable", "random"]
