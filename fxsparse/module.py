"""What `compile` returns."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxsparse.backend import Target, find_target, for_all_sizes
from fxsparse.backend.inductor import Inductor
from fxsparse.backend.target import COMPILING, Runnable
from fxsparse.errors import InputError, TargetError
from fxsparse.ir.files import writing
from fxsparse.ir.graph import flat
from fxsparse.ir.inputs import LAYOUTS, Call, Prepare, as_is, device_of, in_batch, same_constant
from fxsparse.ir.shapes import propagate
from fxsparse.ir.version import VERSION
from fxsparse.package import Saved, write
from fxsparse.package.aoti import check_suffix, compile_aoti, machine
from fxsparse.report import Report

log = logging.getLogger("fxsparse")
_AGAIN = "Compile again with example_inputs of the new shape and dtype; one SparseModule serves one signature."
_EACH_SHAPE = _AGAIN + " For inputs of many shapes: torch.compile(model, backend='fxsparse') builds for each."
_NO_BATCH = (
    "An input without a batch is told by its size: compile with an example of another batch size than its dimension 0, "
    "or with dynamic_batch=False."
)


@dataclass
class Build:
    """A compiled model.

    gm        the graph that was lowered, with the user's own signature
    example   flattened inputs it was built for
    run       flattened inputs -> flattened outputs, for the example's batch size
    prepare   applied to the flattened inputs first (a memory format)
    in_spec   structure of (positional inputs, inputs by name)
    lowered_by  what made `run`: another target where a dense build won
    signature   of the model's forward; None where it is not known
    """

    gm: fx.GraphModule
    example: Sequence[Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    target: Target
    run: Runnable
    report: Report
    dynamic_batch: bool
    prepare: Prepare = as_is
    any_batch: Runnable | None = field(default=None)
    lowered_by: Target | None = field(default=None)
    signature: inspect.Signature | None = None

    def __post_init__(self) -> None:
        self.prepared = self.prepare(self.example)
        args, kwargs = self.in_spec.children()
        self.plain = not kwargs.children() and all(child.is_leaf() for child in args.children())
        self.varies = [self.dynamic_batch and varies for varies in in_batch(self.example)]
        self.storages = {b.untyped_storage().data_ptr() for b in self.gm.buffers() if b.numel()}


class SparseModule(nn.Module):
    """The masked model, compiled. For inference: `forward` runs without gradients.

    report        what was done to every weight and what it gained
    graph_module  the rewritten graph, an ordinary fx.GraphModule that runs anywhere

    Inputs have the shapes and dtypes it was compiled for; with `dynamic_batch` the batch is free: dimension 0 of the
    first tensor, and of the others that have as many there; the rest keep their sizes. The example's batch size runs
    code made for it; the first other one makes code for any batch (once, a few seconds).
    Without example inputs it is compiled at the first call, from the model as it is then.
    """

    def __init__(self, build: Callable[[Call], Build]) -> None:
        super().__init__()
        self._make: Callable[[Call], Build] | None = build
        self._build: Build | None = None
        self._told = False
        super().train(False)

    @classmethod
    def of(cls, build: Build) -> SparseModule:
        """The module that runs `build`."""
        module = cls(_made)
        module._build, module._make = build, None
        return module

    def prepare(self, example_inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor) -> SparseModule:
        """Compile now, for inputs like these."""
        return self._prepare(Call.of(example_inputs))

    def _prepare(self, call: Call) -> SparseModule:
        with COMPILING, without_autocast():
            if self._make is not None:
                self._build = self._make(call)
                self._make = None  # lets go of the user's model
        build = self._built("prepare")
        _check_inputs(build, self._leaves(build, call))
        return self

    @property
    def report(self) -> Report:
        return self._built("report").report

    @property
    def graph_module(self) -> fx.GraphModule:
        build = self._built("graph_module")  # one that was loaded has no shapes yet
        return propagate(build.gm, build.example, dynamic_batch=build.dynamic_batch)

    @property
    def example(self) -> Call:
        """Inputs that it was compiled for, (args, kwargs); zeros of those shapes in a module that was loaded."""
        build = self._built("example")
        return Call(*pytree.tree_unflatten(build.example, build.in_spec))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The masked model's outputs, in its own structure."""
        if torch.compiler.is_exporting() and any(map(_stands_in, pytree.tree_leaves((args, kwargs)))):
            raise InputError("torch.export of a SparseModule", expected="PyTorch's operators", got="compiled code",
                             do="fast.graph_module is the same function in operators: export that.")  # fmt: skip
        call = Call(args, kwargs)
        build = self._build or self._prepare(call)._built("forward")
        inputs = self._leaves(build, call)
        return pytree.tree_unflatten(run_build(build, inputs, _check_inputs(build, inputs)), build.out_spec)

    def _leaves(self, build: Build, call: Call) -> Sequence[Any]:
        args = call.args
        if build.plain and not call.kwargs and len(args) == len(build.example) and all(map(_is_tensor, args)):
            return args
        with contextlib.suppress(ValueError):
            return build.in_spec.flatten_up_to(tuple(call))  # by name: a dict may have its keys in another order
        wanted, given = (c.names(build.signature) for c in (self.example, call))
        try:
            return build.in_spec.flatten_up_to(tuple(call.like(self.example, build.signature)))
        except TypeError as error:
            got = str(error).removeprefix("got ")
            raise _misfit(", ".join(wanted), got, do=_as_compiled(self.example, wanted)) from None
        except ValueError as error:
            if given != wanted:
                do = _as_compiled(self.example, wanted, given)
                raise _misfit(", ".join(wanted), ", ".join(given), do=do) from None
            raise _misfit("inputs in the form of example_inputs", str(error)) from None

    def train(self, mode: bool = True) -> SparseModule:
        """It stays in evaluation mode, and says so once: a part of a model that is trained may well be frozen."""
        if mode and not self._told:
            self._told = True
            warnings.warn(
                "a SparseModule stays in evaluation mode, and no gradients pass through it. To train what it was "
                "compiled from, train the original model under its masks, then compile it again.",
                UserWarning,
                stacklevel=2,
            )
        return self

    def extra_repr(self) -> str:
        """Inputs, target and verdict, on one line."""
        if self._build is None:
            return "not compiled yet: the first call does it"
        report = self._build.report
        return f"{'; '.join(_served(self._build))}; target {report.target!r}; {report.verdict}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
        """For .to(), .half() and their like, on it or on a module around it. InputError where they ask for a change."""
        example = self._build.example if self._build is not None else ()  # later inputs say what it is to be
        for x in (x for x in example if isinstance(x, Tensor)):
            new = fn(x.new_empty(0))
            if (new.dtype, new.device) != (x.dtype, x.device):
                raise InputError("conversion of a SparseModule", expected=f"{x.dtype} on {x.device}, as compiled",
                                 got=f"{new.dtype} on {new.device}",
                                 do="Convert the original model and its inputs, then compile it.")  # fmt: skip
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises InputError: its weights are part of the code."""
        raise InputError("load_state_dict of a SparseModule", expected="none", got="a state dict",
                         do="Load it into the original model, then compile that.")  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseModule:
        """A module of its own that shares the compiled code, which nothing changes."""
        copied = SparseModule(copy.deepcopy(self._make, memo)) if self._make is not None else SparseModule(_made)
        copied._build, copied._make = self._build, copied._make if self._build is None else None
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Compiled code belongs to this process. Raises InputError once there is some."""
        if self._build is not None:
            raise InputError("pickle of a SparseModule", expected="a module that was not compiled yet",
                             got="generated code, which belongs to this process",
                             do="module.save(path) writes it as data, for fxsparse.load.")  # fmt: skip
        return self.__dict__

    def save(self, path: str | os.PathLike[str], *, native: bool = False) -> None:
        """Write graph, packed weights, decisions and report to one file for `fxsparse.load`, whole or not at all.

        native  also compile it with AOTInductor and put that code in, so that the first call after loading is fast.
                It is only run by `load(path, native=True)`, on the same kind of machine
        Raises InputError for a path that cannot be written, and for a graph that cannot be written as data.
        """
        build = self._built("save")
        layout = next(name for name, prepare in LAYOUTS.items() if prepare is build.prepare)
        lowered_by = build.lowered_by or build.target
        saved = Saved(build.gm, build.example, build.target.name, lowered_by.name, layout, build.dynamic_batch,
                      build.report, build.signature)  # fmt: skip
        with writing(path):
            if native:
                saved.native, saved.native_for = _native(build, lowered_by)
            write(saved, path, VERSION)

    def save_aoti(self, path: str | os.PathLike[str], *, dynamic_batch: bool = False) -> None:
        """Compile it with AOTInductor into `path`, a .pt2 that runs without Python and without the model.

        dynamic_batch  one library for any batch size; otherwise it is for the example's shapes only
        The library does not check its inputs: they must have the example's shapes, dtypes and memory format.
        Raises InputError for a path that is no .pt2 or cannot be written, TargetError without a C++ compiler and for
        packed layers on a GPU.
        """
        build = self._built("save_aoti")
        check_suffix(path, "path of save_aoti")
        find_target("inductor")
        about = {"fxsparse": VERSION, "inputs": "; ".join(_describe(x) for x in build.example)}
        with writing(path):
            compile_aoti(self.graph_module, self.example, path, dynamic_batch=dynamic_batch, metadata=about)

    def _built(self, what: str) -> Build:
        if self._build is None:
            raise InputError(f"SparseModule.{what}", expected="a compiled module", got="one that was never called",
                             do="Pass example_inputs to fxsparse.compile, or call the module once.")  # fmt: skip
        return self._build


def without_autocast() -> contextlib.AbstractContextManager[object]:
    """Operators keep the dtypes of the graph, which are the model's."""
    enabled = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not enabled:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for device in enabled:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def run_build(build: Build, inputs: Sequence[Any], same: bool) -> list[Any]:
    """Flattened outputs for flattened inputs. `same`: their batch size is the example's."""
    with torch.no_grad(), without_autocast():
        if same:
            outputs = build.run(*_laid_out(build.prepare(inputs), build.prepared))
        else:
            outputs = _any_batch(build, inputs)(*_laid_out(inputs, build.example))
        return [_unaliased(y, build, inputs) for y in outputs]


def _any_batch(build: Build, inputs: Sequence[Any]) -> Runnable:
    if 0 in (x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim()):
        return functools.partial(_empty, build)
    with COMPILING:
        if build.any_batch is None:
            target = for_all_sizes(build.target, build.lowered_by)
            log.info("lower (%s, any batch size)", target.name)
            build.any_batch = target.lower_dynamic(build.gm)
    return build.any_batch


def _empty(build: Build, *inputs: Any) -> Sequence[Any]:
    """No samples: the graph as it is, as generated code may not like empty loops. Raises InputError where it fails."""
    try:
        return cast("Sequence[Any]", flat(build.gm)(*inputs))
    except RuntimeError as error:
        raise _misfit("at least one sample: this model's graph cannot run without", str(error)[:200]) from None


def _native(build: Build, lowered_by: Target) -> tuple[bytes, Mapping[str, str]] | tuple[None, None]:
    """An AOTInductor package of the flat graph, and the machine it is for."""
    if not isinstance(lowered_by, Inductor):
        log.warning("no native code is saved: the build runs on target %r, which generates none", lowered_by.name)
        return None, None
    device = device_of(build.example)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        try:
            compile_aoti(flat(build.gm), Call(tuple(build.prepared), {}), path)
        except TargetError as error:
            log.warning("no native code is saved: %s", error.got)
            return None, None
        return path.read_bytes(), machine(device)


def _made(inputs: tuple[Any, ...]) -> Build:
    raise AssertionError("compiled already")


def _check_inputs(build: Build, inputs: Sequence[Any]) -> bool:
    """True when the inputs have the example's batch size. Raises InputError when they do not fit otherwise."""
    same, batches = True, set()
    for i, (x, example, varies) in enumerate(zip(inputs, build.example, build.varies, strict=True)):
        if not isinstance(example, Tensor):
            if not same_constant(x, example):
                raise _misfit(f"{example!r}, as in example_inputs", repr(x), _where(build, i))
            continue
        if not isinstance(x, Tensor) or _kind(x) != _kind(example):
            raise _misfit(_describe(example), _describe(x), _where(build, i))
        if x.shape != example.shape:
            if not varies or x.dim() != example.dim() or x.shape[1:] != example.shape[1:]:
                do = _EACH_SHAPE if x.dim() == example.dim() else _AGAIN
                raise _misfit(_served(build)[i], _describe(x), _where(build, i), do)
            same = False
        if varies:
            batches.add(x.shape[0])
    if len(batches) > 1:  # code for one would read past the other
        raise _misfit("one batch size in all inputs", f"batch sizes {sorted(batches)}", do=_NO_BATCH)
    return same


def _served(build: Build) -> list[str]:
    """Each input that it takes."""
    sizes = zip(build.example, build.varies, strict=True)
    return [_describe(x) + (", any batch size" if varies else "") for x, varies in sizes]


def _where(build: Build, index: int) -> str:
    """What the model's signature calls the argument that holds this leaf of the flattened inputs."""
    example = Call(*pytree.tree_unflatten(build.example, build.in_spec))
    values = zip(example.names(build.signature), [*example.args, *example.kwargs.values()], strict=True)
    name = [name for name, value in values for _ in pytree.tree_leaves(value)][index]
    return name if name.startswith("input ") else f"input {name!r}"


def _kind(x: Tensor) -> tuple[object, ...]:
    return x.dtype, x.device, x.layout, x.is_nested


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where `x` already is, contiguous for all else."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.dim())
    last = wanted is not None and not x.is_contiguous() and x.is_contiguous(memory_format=wanted)
    return wanted if last and wanted is not None else torch.contiguous_format


def _laid_out(inputs: Sequence[Any], like: Sequence[Any]) -> Sequence[Any]:
    """Inputs in the memory formats the code was made for; Inductor's reads by stride."""
    return [
        x.contiguous(memory_format=memory_format(y)) if isinstance(x, Tensor) and isinstance(y, Tensor) else x
        for x, y in zip(inputs, like, strict=True)
    ]


def _stands_in(x: object) -> bool:
    """For a tensor, while torch.export traces: that another thread exports is no matter here."""
    return isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter)


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def _unaliased(y: Any, build: Build, inputs: Sequence[Any]) -> Any:
    """A copy where an output shares memory with an input or a weight, once x + 0 is x: writing to it must be safe."""
    if not isinstance(y, Tensor) or not y.numel():
        return y
    storage = y.untyped_storage().data_ptr()
    shared = storage in build.storages or any(
        isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage for x in inputs
    )
    return y.clone() if shared else y


def _misfit(expected: str, got: str, where: str = "input", do: str = _AGAIN) -> InputError:
    return InputError(f"{where} of a SparseModule", expected=expected, got=got, do=do)


def _as_compiled(example: Call, wanted: Sequence[str], given: Sequence[str] | None = None) -> str:
    """The advice to write a call as `example` was; with the names in `given`, which are missing and which too many."""
    form = ", ".join([*wanted[: len(example.args)], *(f"{name}=..." for name in example.kwargs)])
    missing, extra = ([n for n in a if n not in b] for a, b in ((wanted, given or wanted), (given or wanted, wanted)))
    parts = [f"{what}: {', '.join(names)}." for what, names in (("Missing", missing), ("Not expected", extra)) if names]
    return " ".join([*parts, f"Call it as it was compiled, ({form}), or compile again with other example_inputs."])


def _describe(x: Any) -> str:
    if not isinstance(x, Tensor) or x.is_nested:  # a nested tensor has no shape
        return type(x).__name__ if not isinstance(x, Tensor) else "a nested tensor"
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" + ("" if x.layout is torch.strided else f", {x.layout}")
