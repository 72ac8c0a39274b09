"""Is the result the masked model? Outputs are compared, within what the reference's own rounding justifies.

error(y) = max |y - y64|, y64 being the masked model in float64. A result y may be off by `SLACK` times the error that
the masked model itself makes in its dtype, images channels last or not, plus a floor of a few units in the last place
of the largest output. In float64, its error is what a few last places more or less in every weight and input do; in
float32 on a GPU that may use tf32, at least what rounding the operands of products to its ten bits can do. Of
integers and bools (an argmax, a threshold) those that differ are counted: what rounding turns over in the masked model,
it may turn over here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxsparse.errors import VerificationError, first_line
from fxsparse.ir.graph import clone, get_tensor, on_gpu, release, set_tensor
from fxsparse.ir.inputs import in_order

SLACK = 4.0  # another order of summation makes an error of the same size, not the same error; maxima vary by a few
FLOOR_ULP = 16.0
FLOAT64_EPS = torch.finfo(torch.float64).eps
TF32_EPS = 2.0**-10
_PRODUCT = re.compile(r"(add|b|baddb)?mm\.|linear\.|matmul\.|(add)?mv\.|dot\.|bilinear\.|scaled_dot_product").match
_NOT_FINITE = (
    "The masked model itself gives inf or nan here, and 0 * inf is not kept where a mask has zeros. Give inputs under "
    "which it is finite, or leave out that mask."
)
FLOOR_FLIPS = 4  # of many integers: where the reference turned none over, rounding may yet turn over a few


@dataclass(frozen=True)
class Reference:
    """What the masked model gives on some inputs, and how far a result may be from it.

    inputs   flattened, in the model's dtype
    exact    flattened outputs in float64
    dtypes   per output, of the masked model; None for what is no tensor
    allowed  per output, the largest |difference| that passes
    """

    inputs: tuple[Any, ...]
    exact: tuple[Any, ...]
    dtypes: tuple[torch.dtype | None, ...]
    allowed: tuple[float, ...]


def wide_inputs(inputs: Sequence[Any]) -> list[Any]:
    """Floating tensors in float64, complex ones in complex128, all else as it is."""
    return [x.to(_wide_dtype(x.dtype)) if isinstance(x, Tensor) else x for x in inputs]


def probed(
    flat_gm: fx.GraphModule, inputs: Sequence[Any], shapes: Sequence[Sequence[int]] | None = None, seed: int = 0
) -> Reference:
    """`reference` on random inputs, or on the example's own values where floats among them are positions in a table."""
    try:
        return reference(flat_gm, probe(inputs, shapes, seed))
    except IndexError:
        return reference(flat_gm, probe(inputs, shapes, seed, of_its_own=True))


def probe(
    inputs: Sequence[Any], shapes: Sequence[Sequence[int]] | None = None, seed: int = 0, *, of_its_own: bool = False
) -> tuple[Any, ...]:
    """Random inputs of the same shapes: the example's own values may be zeros, under which anything agrees.

    Floating tensors are normal with the example's scale; integer ones, and all with `of_its_own`, repeat the example.
    `shapes` are other ones to have, of every input.
    """
    generator = torch.Generator().manual_seed(seed)

    def one(x: Any, shape: Sequence[int]) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return x
        x = _of_shape(x, shape)
        if of_its_own or not x.is_floating_point():
            return x
        spread = float(x.detach().double().std()) if x.numel() > 1 else 0.0
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu") * (spread or 1.0)
        return torch.empty_like(x).copy_(noise + float(x.detach().double().mean()))  # in the example's memory format

    return tuple(map(one, inputs, shapes or [getattr(x, "shape", ()) for x in inputs]))


def _of_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` cut or repeated to `shape`, its dimensions in the same order in memory."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    for dim, size in enumerate(shape):
        if size != x.shape[dim]:
            x = x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])
    return in_order(x, order)


def reference(flat_gm: fx.GraphModule, inputs: Sequence[Any]) -> Reference:
    """Run the masked model `flat_gm` (flattened inputs and outputs) in its own dtype and in float64."""
    wide = widen(flat_gm)
    with torch.no_grad():
        exact = _exact(wide, inputs)
        others = [_outputs(flat_gm(*inputs))]
        if any(map(_is_image, inputs)):
            others.append(_outputs(flat_gm(*map(_channels_last, inputs))))
        if any(isinstance(y, Tensor) and y.dtype == torch.float64 for y in others[0]):
            generator = torch.Generator().manual_seed(0)
            shaken = _shaken(wide, generator)
            others.append(_outputs(shaken(*[_shake(x, generator) for x in wide_inputs(inputs)])))
            release(shaken)
        if products := _in_tf32(flat_gm):
            others.append(_outputs(_Shaking(flat_gm, products).run(*inputs)))
    release(wide)
    for own, y in zip(others[0], exact, strict=True):
        _check_range(own, y)
    allowed = [max(map(_allowed, own, itertools.repeat(y))) for y, *own in zip(exact, *others, strict=True)]
    dtypes = [getattr(own, "dtype", None) for own in others[0]]
    return Reference(tuple(inputs), tuple(exact), tuple(dtypes), tuple(allowed))


def _check_range(own: Any, exact: Any) -> None:
    """Raises VerificationError where the masked model overflows in its dtype: no result can be judged by that."""
    if isinstance(own, Tensor) and own.is_floating_point() and bool((exact.isfinite() & ~own.isfinite()).any()):
        raise VerificationError(
            f"the masked model in {str(own.dtype).removeprefix('torch.')}",
            expected="finite outputs, as it has in float64",
            got="inf or nan",
            do="Use a dtype of a wider range (bfloat16, float32), or pass verify='off' and compare outputs yourself.",
        )


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()


def _channels_last(x: Any) -> Any:
    """Sums go in another order then; a norm by the statistics of its input magnifies that in constant channels."""
    return x.contiguous(memory_format=torch.channels_last) if _is_image(x) else x


def _exact(wide: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    try:
        return _outputs(wide(*wide_inputs(inputs)))
    except (RuntimeError, ValueError) as error:
        raise VerificationError(
            "the masked model in float64",
            expected="operators that run in float64 too",
            got=first_line(error),
            do="Pass verify='off', and compare outputs yourself.",
        ) from None


def widen(gm: fx.GraphModule) -> fx.GraphModule:
    """A clone in float64: floating weights, and the floating dtypes that the model itself asks for."""
    wide = clone(gm)
    for node in wide.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _wide_dtype)
    wide.recompile()
    for target in {str(n.target) for n in wide.graph.nodes if n.op == "get_attr"}:
        tensor = get_tensor(wide, target)
        dtype = _wide_dtype(tensor.dtype)
        set_tensor(wide, target, tensor if tensor.dtype == dtype else tensor.to(dtype))
    return wide


def _shaken(gm: fx.GraphModule, generator: torch.Generator) -> fx.GraphModule:
    """A float64 model is its own reference, and shows no error. This clone does: weights are off by a few last places.

    What that changes is what rounding can change, whatever the order of summation.
    """
    shaken = clone(gm)
    for target in dict.fromkeys(str(n.target) for n in shaken.graph.find_nodes(op="get_attr")):
        set_tensor(shaken, target, _shake(get_tensor(shaken, target), generator))
    return shaken


def _shake(
    x: Any, generator: torch.Generator, dtype: torch.dtype = torch.float64, width: float = 4 * FLOAT64_EPS
) -> Any:
    if not isinstance(x, Tensor) or x.dtype != dtype:
        return x
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device="cpu") - 0.5
    return x * (1 + width * noise.to(x.device))


class _Shaking(fx.Interpreter):
    """Runs a float32 model with the operands of `products` off by what rounding them to tf32 would change.

    A library takes tf32 for one build and not for another: then the model shows no such error of its own.
    """

    def __init__(self, gm: fx.GraphModule, products: set[fx.Node]) -> None:
        super().__init__(gm)
        self._products, self._generator = products, torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._products:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self.call_function(n.target, pytree.tree_map(self._rounded, args), kwargs)

    def _rounded(self, x: Any) -> Any:
        return _shake(x, self._generator, torch.float32, TF32_EPS)


def _in_tf32(gm: fx.GraphModule) -> set[fx.Node]:
    """The products that torch's switches let a GPU take in tf32: cuDNN's for convolutions, another for matrices."""
    backends: Any = torch.backends
    windows, matrices = (switch.fp32_precision == "tf32" for switch in (backends.cudnn.conv, backends.cuda.matmul))
    if not on_gpu(gm):
        return set()
    named = {n: str(n.target).removeprefix("aten.") for n in gm.graph.nodes if str(n.target).startswith("aten.")}
    return {n for n, name in named.items() if (windows and name.startswith("conv")) or (matrices and _PRODUCT(name))}


def _wide_dtype(x: Any) -> Any:
    if not isinstance(x, torch.dtype):
        return x
    return torch.float64 if x.is_floating_point else torch.complex128 if x.is_complex else x


def check(outputs: Any, ref: Reference, suspect: str, do: str) -> str:
    """`largest |difference| ..., allowed ...`. Raises VerificationError when an output is further off than allowed."""
    worst = (0.0, 0.0)
    each = zip(_outputs(outputs), ref.exact, ref.dtypes, ref.allowed, strict=True)
    for i, (y, exact, dtype, allowed) in enumerate(each):
        if not isinstance(exact, Tensor):
            continue
        if not isinstance(y, Tensor) or y.dtype != dtype:
            raise VerificationError(suspect, expected=f"output[{i}] in {dtype}",
                                    got=str(getattr(y, "dtype", type(y).__name__)), do=do)  # fmt: skip
        y, exact = _real(y), _real(exact)
        if y.shape != exact.shape:
            raise VerificationError(suspect, expected=f"output[{i}] of shape {tuple(exact.shape)}",
                                    got=str(tuple(y.shape)), do=do)  # fmt: skip
        off = _difference(y, exact)
        if off > allowed:
            do = do if bool(exact.isfinite().all()) else _NOT_FINITE
            raise _wrong(y, exact, i, off, allowed, suspect, do)
        worst = max(worst, (off, allowed))
    return f"largest |difference| {worst[0]:.1e}, allowed {worst[1]:.1e}"


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _difference(y: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    if not exact.is_floating_point():
        return float((y != exact).sum())
    gap = (y.double() - exact.double()).abs()
    same = (y.double() == exact.double()) | (y.isnan() & exact.isnan())  # inf - inf is not a difference
    gap = gap.masked_fill(same, 0.0)
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


def _allowed(own: Any, exact: Any) -> float:
    if not isinstance(exact, Tensor):
        return 0.0
    own, exact = _real(own), _real(exact)
    if not exact.numel():
        return 0.0
    if not exact.is_floating_point():
        return SLACK * _difference(own, exact) + float(min(FLOOR_FLIPS, exact.numel() // 1000))
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    own_error = _difference(own, exact)
    own_error = own_error if own_error != float("inf") else 0.0
    return SLACK * own_error + FLOOR_ULP * torch.finfo(own.dtype).eps * scale


def _wrong(y: Tensor, exact: Tensor, i: int, off: float, allowed: float, suspect: str, do: str) -> VerificationError:
    gap = (y.double() - exact.double()).abs().nan_to_num(float("inf"))
    position = [int(k) for k in torch.unravel_index(gap.argmax(), gap.shape)]
    where = f"output[{i}]{position}"
    expected, got = (
        f"the masked model's output within {allowed:.1e}",
        f"a largest |difference| of {off:.3g}, at {where}",
    )
    if not exact.is_floating_point():
        expected = f"the masked model's output, all but {int(allowed)} elements of it"
        got = f"{int(off)} elements that differ, at {where} for one"
    return VerificationError(suspect, expected=expected, got=got, do=do)


def _outputs(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
