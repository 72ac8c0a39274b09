"""The operator `fxsparse::n_m`: a linear layer with an N:M weight.

    n_m(x, values, codes, bias, shape, n, m) -> x @ w.T + bias

x is [..., I], the result [..., O]; `shape` is [O, I]. 1:4 and 2:4 in float32, bfloat16 and float64 run the C++ kernel
on a CPU; anything else unpacks the weight and runs dense. It has no gradient. The arrays are trusted: `NM` checked
them. All else is checked here. Targets for GPUs replace it by torch's own 2:4 product: `semi_structured`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from fxsparse.errors import InputError
from fxsparse.formats import semi_structured
from fxsparse.formats.format import Format, Standard
from fxsparse.formats.n_m import NM, misfits, pack, unpack
from fxsparse.formats.operator import LIBRARY, define
from fxsparse.ir.graph import arg, aten, get_tensor, new_weight
from fxsparse.ir.symbols import concrete
from fxsparse.kernels.cpu import n_m as kernel

# Without a timer only layers whose weights few tokens share: with more, multiplying costs more than reading.
FEW_TOKENS = {torch.float32: 4, torch.bfloat16: 1}


def _unfolded(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, *numbers: int) -> Sequence[Any]:
    rows, columns, n, m = numbers
    return x, values, codes, bias, [rows, columns], n, m


n_m, n_m_into = define(
    "n_m",
    "Tensor x, Tensor values, Tensor codes, Tensor? bias, int[] shape, int n, int m",
    kernel.register_operator,
    kernel.DTYPES,
    # a list among the arguments takes the C++ compiler a sixth of a second per call (backend/inductor_cpp.py)
    folded=("Tensor x, Tensor values, Tensor codes, Tensor? bias, int rows, int columns, int n, int m", _unfolded),
)


def multiply(packed: NM, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias` [..., O] for x [..., I]; bias [O] in the dtype of x. Raises InputError for what does not fit."""
    return cast(Tensor, n_m(x, packed.values, packed.codes, bias, list(packed.shape), packed.n, packed.m))


def _check(x: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
    if not x.dim() or x.shape[-1] != shape[1]:
        raise _misfit("x", f"{shape[1]} columns in the last dimension", f"shape {tuple(x.shape)}")
    if bias is not None and (list(bias.shape) != [shape[0]] or bias.dtype != x.dtype):
        raise _misfit("bias", f"{x.dtype} [{shape[0]}]", f"{bias.dtype} {list(bias.shape)}")


def _misfit(what: str, expected: str, got: str) -> InputError:
    do = "x is [..., I], as for torch.nn.functional.linear with the weight [O, I]."
    return InputError(f"{what} of an N:M product", expected=expected, got=got, do=do)


def _fake(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: list[int], n: int, m: int) -> Tensor:
    _check(x, bias, shape)
    return x.new_empty([*x.shape[:-1], shape[0]])


def _cpu(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: list[int], n: int, m: int) -> Tensor:
    """The C++ kernel. Called once per layer: at batch 1 every microsecond here is seen in the whole network."""
    if (n, m) not in kernel.PATTERNS or x.dtype not in kernel.DTYPES or values.dtype != x.dtype or not x.numel():
        return reference(x, values, codes, bias, shape, n, m)
    _check(x, bias, shape)
    y = x.new_empty([*x.shape[:-1], shape[0]])
    kernel.run(x.contiguous(), y, values, codes, None if bias is None else bias.contiguous())
    return y


def reference(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: list[int], n: int, m: int
) -> Tensor:
    """The same in PyTorch's own operators, on any device and in any dtype."""
    _check(x, bias, shape)
    weight = unpack(NM(values.cpu(), codes.cpu(), (shape[0], shape[1]), n, m)).to(x)
    return F.linear(x, weight, bias)


torch.library.register_fake("fxsparse::n_m", _fake, lib=LIBRARY)
LIBRARY.impl("n_m", reference, "CompositeExplicitAutograd")
LIBRARY.impl("n_m", _cpu, "CPU")


class NMFormat(Format):
    """Linear layers, 2:4 or sparser, where reading the weights is what takes the time."""

    name = "n_m"
    layers = (aten.linear.default,)
    operator = n_m
    reads_in_order = True

    def why_not(self, node: fx.Node, weight: Tensor) -> str:
        if node.target not in self.layers:
            return "only linear layers have this kernel"
        if weight.dim() != 2 or not weight.numel():
            return f"the weight has shape {tuple(weight.shape)}"
        if weight.shape[1] % 4:
            return f"{weight.shape[1]} columns are no multiple of 4"
        if wrong := misfits(weight != 0, 2, 4):
            return f"not 2:4: {wrong} of {weight.numel() // 4} groups of 4 columns keep more than 2"
        if weight.device.type == "cuda":
            return semi_structured.why_not(weight)
        if weight.dtype not in kernel.DTYPES:
            return f"the kernel has no {str(weight.dtype).removeprefix('torch.')}"
        return ""

    def why_not_untimed(self, node: fx.Node) -> str:
        if node.meta["val"].is_cuda:
            return "on a GPU only a timing can tell"
        tokens, few = math.prod(concrete(node)[:-1]), FEW_TOKENS.get(node.meta["val"].dtype, 0)
        return f"{tokens} tokens share its weights: only a timing can tell" if tokens > few else ""

    def pack(self, weight: Tensor, groups: Sequence[NDArray[np.int64]] | None = None) -> NM:
        """The sparser of 1:4 and 2:4; `groups` are of no use here, rows are stored in order."""
        return pack(weight, 1 if misfits(weight != 0, 1, 4) == 0 else 2, 4)

    def unpack(self, packed: NM) -> Tensor:
        return unpack(packed)

    def lower(self, gm: fx.GraphModule, node: fx.Node, packed: NM) -> fx.Node:
        weight = cast(fx.Node, node.args[1])
        tensors = {n: getattr(packed, n).to(weight.meta["val"].device) for n in ("values", "codes")}
        stored = [new_weight(gm, node, f"{weight.target}_{n}", tensor) for n, tensor in tensors.items()]
        call: Any = gm.graph.call_function
        with gm.graph.inserting_before(node):
            x = call(aten.contiguous.default, (node.args[0],))
            return cast(fx.Node, call(n_m, (x, *stored, arg(node, "bias"), list(packed.shape), packed.n, packed.m)))

    def standard(self, packed: NM) -> Standard:
        """No work is saved in standard operators."""
        return Standard(packed.shape[0] * packed.shape[1], packed.row_groups)

    def expand(self, gm: fx.GraphModule, node: fx.Node) -> fx.Node:
        x, values, codes, bias, shape, n, m = cast(Any, node.args)
        packed = NM(get_tensor(gm, values.target), get_tensor(gm, codes.target), tuple(shape), n, m)
        weight = new_weight(gm, node, str(values.target).removesuffix("_values"), unpack(packed))
        with gm.graph.inserting_before(node):
            return gm.graph.call_function(aten.linear.default, (x, weight, bias))

    def into(self, gm: fx.GraphModule, node: fx.Node) -> Sequence[Any]:
        *tensors, shape, n, m = node.args
        return *tensors, *cast(Any, shape), n, m

    def check_call(self, arguments: Sequence[Any]) -> None:
        values, codes, shape, (n, m) = arguments[1], arguments[2], arguments[4], arguments[5:7]
        kinds = [getattr(a, "dtype", None) for a in (values, codes)]
        known = kinds[0] in (*kernel.DTYPES, torch.float16) and kinds[1] == torch.int32 and (n, m) in kernel.PATTERNS
        if not known or len(shape) != 2:
            raise _misfit("a stored array", "1:4 or 2:4 in a dtype of the kernel, codes in int32", f"{n}:{m}, {kinds}")
        NM(values, codes, (shape[0], shape[1]), n, m)
