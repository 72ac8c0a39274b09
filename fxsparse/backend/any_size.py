"""Code that Inductor made for any size holds for the sizes it had in mind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from fxsparse.backend.target import COMPILING, Runnable

log = logging.getLogger("fxsparse")


class Assumptions:
    """What Inductor took for granted about symbolic sizes when it made code for all of them ("at most 4096 of these").

    TorchDynamo would make guards of it. Without it, this asks before every call.

    any  whether there is something to ask
    """

    def __init__(self, fake: Sequence[Any], guards: Sequence[Any]) -> None:
        found: dict[Any, tuple[int, int, Any]] = {}
        for i, x in enumerate(fake):
            shape: Sequence[Any] = x.shape if isinstance(x, Tensor) else ()
            for dim, size in enumerate(shape):
                if not isinstance(size, int) and size.node.expr.is_symbol:
                    found.setdefault(size.node.expr, (i, dim, size))
        self.where = [(i, dim) for i, dim, _ in found.values()]
        sizes = [size for _, _, size in found.values()]
        if not sizes:
            self.any = False
            return
        self.env = sizes[0].node.shape_env
        text = self.env.produce_guards_expression(placeholders=sizes, guards=list(guards))
        self.code = compile(text or "True", "<assumptions>", "eval")
        # A size may be traced with a limit (`ir.inputs.CUDNN_BATCH`), and code for it count with 32 bits therefore.
        limits = [self.env.bound_sympy(size.node.expr).upper for size in sizes]
        self.any = bool(guards) or any(isinstance(limit, sympy.Integer) for limit in limits)

    def hold(self, inputs: Sequence[Any]) -> bool:
        """For the sizes of these inputs."""
        return bool(self.env.evaluate_guards_expression(self.code, [inputs[i].shape[dim] for i, dim in self.where]))


class AnySize:
    """Code for any size; where what it assumes does not hold, code for single sizes, and then the graph as it is.

    lower  makes code for the sizes of some inputs
    plain  the graph, for any size
    """

    MOST = 8  # sizes that get code of their own

    def __init__(
        self, lower: Callable[[Sequence[Any]], Runnable], plain: Runnable, run: Runnable, assumptions: Assumptions
    ) -> None:
        self.lower, self.plain, self.run, self.assumptions = lower, plain, run, assumptions
        self.others: dict[tuple[torch.Size, ...], Runnable] = {}

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self.assumptions.hold(inputs):
            return self.run(*inputs)
        shapes = tuple(x.shape for x in inputs if isinstance(x, Tensor))
        with COMPILING:
            if shapes not in self.others and len(self.others) < self.MOST:
                log.info("lower (inductor, for %s alone)", ", ".join(str(tuple(shape)) for shape in shapes))
                self.others[shapes] = self.lower(inputs)
        return self.others.get(shapes, self.plain)(*inputs)
