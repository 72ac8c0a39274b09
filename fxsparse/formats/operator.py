"""Operators of formats: each has a twin, `<name>_into`, that writes into memory of the caller's.

Inductor plans and reuses such memory (`backend/inductor.py`), and on a CPU the twin runs without Python in between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fxsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
Operator = torch._ops.OpOverload


def define(
    name: str,
    arguments: str,
    register: Callable[[], None],
    dtypes: Collection[torch.dtype],
    folded: tuple[str, Callable[..., Sequence[Any]]] | None = None,
) -> tuple[Operator, Operator]:
    """`fxsparse::<name>(arguments) -> Tensor`, still without kernels, and its twin.

    arguments  of the schema; the first is x, the second a stored tensor in the dtype of x
    register   gives the twin its kernel for the CPU in C++, which takes x in these dtypes
    folded     the twin's own arguments, where it takes fewer, and what gives the operator's for them
    """
    of_twin, unfold = folded or (arguments, lambda *same: same)
    LIBRARY.define(f"{name}({arguments}) -> Tensor", tags=TAGS)
    LIBRARY.define(f"{name}_into({of_twin}, Tensor(a!) out) -> ()", tags=TAGS)
    operator, twin = (getattr(torch.ops.fxsparse, n).default for n in (name, f"{name}_into"))

    def into(x: Tensor, *rest: Any) -> None:
        """Until the kernel in C++ is there; on a CPU this call brings it, and takes it."""
        if x.device.type == "cpu" and rest[0].dtype == x.dtype in dtypes:
            register()
            twin(x, *rest)
        else:
            rest[-1].copy_(operator(*unfold(x, *rest[:-1])))

    torch.library.register_fake(f"fxsparse::{name}_into", lambda *_: None, lib=LIBRARY)
    LIBRARY.impl(f"{name}_into", into, "CompositeExplicitAutograd")
    return operator, twin
