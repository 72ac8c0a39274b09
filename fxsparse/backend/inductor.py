"""torch._inductor, called directly: no dynamo and no guards at run time, weights frozen into the code.

`freezing` packs weights for oneDNN and folds layouts. It only works on a module that owns its weights: through
`torch.compile(model, options={"freezing": True})` it silently does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing

from fxsparse.backend.any_size import AnySize, Assumptions
from fxsparse.backend.cuda_graph import captured
from fxsparse.backend.memory import give_memory
from fxsparse.backend.onednn import faster_products
from fxsparse.backend.target import Runnable, Target
from fxsparse.errors import FxSparseError, TargetError, first_line
from fxsparse.formats import BY_OPERATOR, KERNELS
from fxsparse.formats.gpu import placed
from fxsparse.ir.graph import arg, aten, fake_mode, flat, is_ours, on_gpu
from fxsparse.ir.quiet import compiling_quietly
from fxsparse.kernels.build import compiler, compilers


class Inductor(Target):
    """Generated C++ and oneDNN on a CPU; Triton, cuDNN and cuBLAS on a GPU."""

    name = "inductor"

    def require(self) -> None:
        if compiler() is None:
            raise TargetError(
                "target 'inductor'",
                expected=f"a C++ compiler ({' or '.join(compilers())}) on PATH, which Inductor calls",
                got="none",
                do="Install one (Debian: apt-get install g++), set CXX, or pass target='eager'.",
            )

    def formats(self, device: torch.device) -> tuple[str, ...]:
        return KERNELS.get(device.type, ())

    def options(self, gm: fx.GraphModule) -> dict[str, Any]:
        """Inductor's settings for `gm`, at any shape."""
        return options(gm)

    def lower(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
        import torch._inductor

        module = lowered(gm)
        for node in module.graph.nodes:  # symbolic shapes of the capture mean nothing to this trace
            node.meta.pop("val", None)
        with failing_as(f"target {self.name!r}"), torch.no_grad(), _generated(), faster_products():
            run = cast(Runnable, torch._inductor.compile(module, list(inputs), options=self.options(gm) | _tuned(gm)))
        return captured(run, inputs)

    def lower_dynamic(self, gm: fx.GraphModule) -> Runnable:
        import torch._inductor

        module = lowered(gm)
        fake = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
        patches, mode, where = {"config_patches": self.options(gm)}, fake_mode(module), f"target {self.name!r}"
        before = len(mode.shape_env.guards)
        quiet, traced = _no_word_of_saving(), tracing(TracingContext(mode))
        with failing_as(where), torch.no_grad(), _generated(), quiet, traced:
            run = torch._inductor.standalone_compile(
                module, fake, dynamic_shapes="from_tracing_context", options=patches
            )
        assumed = Assumptions(fake, mode.shape_env.guards[before:])
        if not assumed.any:
            return cast(Runnable, run)
        return AnySize(functools.partial(self.lower, gm), placed(gm), cast(Runnable, run), assumed)


@contextlib.contextmanager
def failing_as(where: str, do: str = "target='eager' compiles nothing.") -> Iterator[None]:
    """Inside, whatever torch.export and Inductor raise becomes a TargetError of `where`; they keep quiet."""
    try:
        with compiling_quietly():
            yield
    except FxSparseError:
        raise
    except Exception as error:  # noqa: BLE001 - of torch, of sympy, or of a compiler that was called
        raise TargetError(where, expected="a graph and a C++ compiler that Inductor can work with",
                          got=first_line(error), do=do) from None  # fmt: skip


@contextlib.contextmanager
def _generated() -> Iterator[None]:
    """What is generated meanwhile keeps the memory of its intermediate results, and goes with what runs it.

    Generated modules hold that and the weights, and torch keeps them until the process ends. Every build that lost to a
    faster one would stay in memory otherwise.
    """
    from torch._inductor.codecache import PyCodeCache

    before = set(map(id, PyCodeCache.modules))
    try:
        yield
    finally:
        for module in [m for m in PyCodeCache.modules if id(m) not in before]:
            if give_memory(module) or any(isinstance(value, Tensor) for value in vars(module).values()):
                PyCodeCache.modules.remove(module)
                PyCodeCache.modules_no_attr.pop(str(module.__file__), None)
                sys.modules.pop(module.__name__, None)


@contextlib.contextmanager
def _no_word_of_saving() -> Iterator[None]:
    """Torch warns that what it built for any size cannot be saved; a SparseModule is saved as its graph."""
    logger = logging.getLogger("torch._inductor.standalone_compile")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def lowered(gm: fx.GraphModule) -> fx.GraphModule:
    """A flat clone with our operators as they run best where `gm` is."""
    return placed(gm) if on_gpu(gm) else with_memory(flat(gm))


def with_memory(gm: fx.GraphModule) -> fx.GraphModule:
    """Our operators write into tensors whose memory Inductor plans and reuses.

        y = op(x, ...)  ->  y = new_empty(x, shape); op_into(x, ..., y)    or in the place of a residual

    A result that the operator itself made would be new at every call, and in no memory that is kept (`memory.py`).
    """
    for node in [n for n in gm.graph.nodes if n.target in BY_OPERATOR]:
        arguments = BY_OPERATOR[node.target].into(gm, node) if _keeps_open_sizes(node) else None
        if arguments is not None:
            _call_twin(gm, node, arguments)
    gm.recompile()
    return gm


def _call_twin(gm: fx.GraphModule, node: fx.Node, arguments: Sequence[Any]) -> None:
    twin = getattr(torch.ops.fxsparse, f"{cast(Any, node.target)._opname}_into").default
    with gm.graph.inserting_before(node):
        y = _read_last_by(node) or gm.graph.call_function(aten.new_empty.default, (node.args[0], _sizes(gm, node)))
        gm.graph.call_function(twin, (*arguments, y))
    node.replace_all_uses_with(y)
    stored = [n for n in node.all_input_nodes if n.op == "get_attr"]
    gm.graph.erase_node(node)
    for weight in stored:
        if not weight.users:
            gm.graph.erase_node(weight)


def _read_last_by(node: fx.Node) -> fx.Node | None:
    """The residual that `node` adds, when nothing reads its memory afterwards: the sum goes there.

    Half of what a wide layer writes comes from memory only to be overwritten, and that is spared.
    """
    residual = arg(node, "residual") if node.target._opname == "shuffled_block" else None  # type: ignore[union-attr]
    if residual is None or residual.target is not aten.contiguous.default:
        return None
    shared = [residual]
    while _is_view(shared[0]):
        shared.insert(0, shared[0].all_input_nodes[0])
    for alias in shared:
        shared += [user for user in alias.users if _is_view(user) and user not in shared]
    once = [a for a in node.args if a in shared] == [residual]  # else one group would read what another wrote
    later = any(user > node for alias in shared for user in alias.users)
    return residual if once and not later and shared[0].op == "call_function" else None


def _is_view(node: fx.Node) -> bool:
    """Whether the result may be the memory of its first input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _keeps_open_sizes(node: fx.Node) -> bool:
    """Whether every symbolic size of the result is its first argument's: not so after a stride over any image."""
    x, y = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return all(isinstance(size, int) or str(size) == str(x[dim]) for dim, size in enumerate(y))


def _sizes(gm: fx.GraphModule, node: fx.Node) -> list[Any]:
    """Of the result; symbolic ones are those of the first argument in the same place."""
    x = node.args[0]
    return [
        size if isinstance(size, int) else gm.graph.call_function(aten.sym_size.int, (x, dim))
        for dim, size in enumerate(node.meta["val"].shape)
    ]


def options(gm: fx.GraphModule) -> dict[str, Any]:
    """What code for any shape is made with.

    freezing                      except in float64: it packs convolution weights for oneDNN, which has no float64
    always_keep_tensor_constants  for our operators: the pointers of a few groups would be written anew at every call,
                                  by a kernel of their own, which takes a second to compile
    """
    return {
        "freezing": not any(b.dtype == torch.float64 for b in gm.buffers()),
        "always_keep_tensor_constants": any(is_ours(n) for n in gm.graph.nodes),
    }


def _tuned(gm: fx.GraphModule) -> dict[str, Any]:
    """More for a single shape: on a GPU the library's ways to multiply are timed for every product.

    Triton's templates are not, unless Inductor's own settings say so (TORCHINDUCTOR_MAX_AUTOTUNE=1): on an H200 some
    layers took 6 to 16 s each, for at most 8 %. cuDNN times its algorithms when the graph is captured (`cuda_graph`).
    """
    from torch._inductor import config

    if not on_gpu(gm) or config.max_autotune or config.max_autotune_gemm:
        return {}
    library_alone = {"max_autotune_gemm_backends": "ATEN", "max_autotune_conv_backends": "ATEN"}
    return {"max_autotune_gemm": True, **library_alone}
