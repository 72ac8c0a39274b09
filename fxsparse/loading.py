"""load(): a compiled model from its package."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from fxsparse.backend import Target, find_target, for_all_sizes
from fxsparse.backend.target import COMPILING, Runnable
from fxsparse.ir.graph import on_gpu
from fxsparse.ir.inputs import LAYOUTS, device_of
from fxsparse.ir.shapes import propagate
from fxsparse.module import Build, SparseModule
from fxsparse.package import Saved, read
from fxsparse.package.aoti import load_native, machine

log = logging.getLogger("fxsparse")


def load(path: str | os.PathLike[str], *, target: str | None = None, native: bool = False) -> SparseModule:
    """The module that `SparseModule.save` wrote: the same graph, weights and report.

    On the same CPU its outputs are the same, bit for bit; on a GPU libraries choose anew how to multiply. Nothing of
    the file is run: it holds tensors and JSON, and every name in the JSON is looked up in lists.

    target  what runs it, when it is not to be the one it was compiled for: "eager" needs no compiler
    native  run the machine code that `save(path, native=True)` put in, if it was made for this processor and torch.
            Only for files you trust as you trust a program. Its results may differ in the last bits
    Code is generated at the first call, which takes as long as in `compile` unless Inductor's cache has it.
    Raises PackageError for a file that is damaged, foreign, of another version or made for a device that is not here,
    TargetError for a target that cannot run.
    """
    saved = read(path, native=native)
    chosen = find_target(target or saved.target)
    own = chosen if target else find_target(saved.lowered_by)
    any_target = for_all_sizes(chosen, own)
    prepare = LAYOUTS[saved.layout]
    inputs, signature = prepare(saved.example), saved.gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    run = (native and _native(saved)) or _Lazily(lambda: own.lower(_shaped(saved, own), inputs), f"lower ({own.name})")
    what = f"lower ({any_target.name}, any batch size)"
    return SparseModule.of(Build(
        saved.gm, saved.example, signature.in_spec, signature.out_spec, chosen, run, saved.report,
        saved.dynamic_batch, prepare, _Lazily(lambda: any_target.lower_dynamic(_shaped(saved, any_target)), what), own,
        saved.signature,
    ))  # fmt: skip


def _shaped(saved: Saved, target: Target) -> fx.GraphModule:
    """Its graph, with shapes where whoever lowers it reads them."""
    if target.reads_shapes or on_gpu(saved.gm):  # `formats/gpu.py` chooses by shapes for any target
        return propagate(saved.gm, saved.example, dynamic_batch=saved.dynamic_batch)
    return saved.gm


class _Lazily:
    """A Runnable that is made when it is first called; by one thread, the others wait."""

    def __init__(self, make: Callable[[], Runnable], what: str) -> None:
        self._make, self._what, self._lock = make, what, threading.Lock()
        self._run: Runnable | None = None

    def __call__(self, *inputs: Any) -> Sequence[Tensor]:
        with self._lock:
            if self._run is None:
                log.info(self._what)
                with COMPILING:
                    self._run = self._make()
        return self._run(*inputs)


def _native(saved: Saved) -> Runnable | None:
    """The native code of a package; None, with the reason in the log, when there is none for this machine."""
    if saved.native is None:
        log.warning("the package holds no native code: it is generated at the first call")
        return None
    device = device_of(saved.example)
    here, there = machine(device), dict(saved.native_for or {})
    other = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    if other:
        log.warning("the package's native code is for another machine (%s): it is generated anew", ", ".join(other))
        return None
    with tempfile.TemporaryDirectory() as folder:
        return load_native(saved.native, Path(folder))
