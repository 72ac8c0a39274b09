"""First masks: which weights to keep. Every function returns masks and leaves the model as it is."""

from __future__ import annotations

from fxsparse.prune.erk import erk, erk_densities
from fxsparse.prune.grasp import grasp
from fxsparse.prune.magnitude import magnitude
from fxsparse.prune.prunable import prunable
from fxsparse.prune.random import random
from fxsparse.prune.snip import snip
from fxsparse.prune.synflow import synflow

__all__ = ["erk", "erk_densities", "grasp", "magnitude", "prunable", "random", "snip", "synflow"]
