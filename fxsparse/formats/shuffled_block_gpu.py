"""Linear layers of shuffled blocks on a GPU: the operator `fxsparse::shuffled_block_transposed`.

    shuffled_block(x [..., I]) [..., O]  ->  movedim(shuffled_block_transposed(contiguous(movedim(x, -1, 0))), 0, -1)

Features come first, tokens lie side by side: then a kept column is a row of memory. Two such layers in a row, with what
is done element by element between them, leave no copy. Values lie as that kernel reads them, never in pairs, and groups
that keep the same columns are one: CPUs cut those, for several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxsparse.formats.operator import LIBRARY, TAGS
from fxsparse.formats.shuffled_block import ARRAYS, ShuffledBlock, pack, unpack
from fxsparse.formats.shuffled_block_aten import ACTIVATIONS
from fxsparse.formats.shuffled_block_few import few, has_few, product
from fxsparse.formats.shuffled_block_few import lower as lower_few
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.formats.turned import turned
from fxsparse.ir.graph import arg, aten, get_tensor, new_weight, weight_of
from fxsparse.kernels.shared import epilogue
from fxsparse.kernels.triton import shuffled_block_transposed as kernel

LIBRARY.define(
    "shuffled_block_transposed(Tensor x, Tensor rows, Tensor row_ptr, Tensor columns, Tensor column_ptr,"
    " Tensor values, Tensor value_ptr, Tensor? bias, int out_features, str activation) -> Tensor",
    tags=TAGS,
)
transposed = torch.ops.fxsparse.shuffled_block_transposed.default
ALIGNED = 16  # tokens
_ARRAYS = ("rows", "row_ptr", "columns", "column_ptr", "values", "value_ptr")  # in the order the kernel takes them


def tiled(packed: ShuffledBlock) -> tuple[Tensor, ...]:
    """The arrays as the kernel takes them: [K, L] for each group, groups with equal columns joined."""
    together: dict[bytes, list[int]] = {}
    for g in range(packed.groups):
        columns = packed.columns[int(packed.column_ptr[g]) : int(packed.column_ptr[g + 1])]
        together.setdefault(columns.numpy().tobytes(), []).append(g)
    of_group = packed.row_groups
    groups = [torch.cat([torch.from_numpy(of_group[g]) for g in same]).sort().values for same in together.values()]
    weight = unpack(packed)
    found = pack(weight.float(), [g.numpy() for g in groups])  # in float32: bfloat16 would lie in pairs
    return tuple(getattr(found, n).to(weight.dtype) if n == "values" else getattr(found, n) for n in _ARRAYS)


def run(packed: ShuffledBlock, x: Tensor, geometry: dict[str, Any]) -> Callable[[], Tensor]:
    """The product of `packed` and x [..., I] alone, to time it; of a linear layer without turning x or y."""
    if len(packed.shape) == 4:
        windows = [geometry[name] for name in ("stride", "padding", "dilation")]
        rest = (*(t.to(x.device) for t in packed.tensors), None, None, list(packed.shape), *windows, "none", "rows")
        return lambda: cast(Tensor, shuffled_block(x, *rest))
    arrays, first = [t.to(x.device) for t in tiled(packed)], turned(x.reshape(-1, x.shape[-1]), True)
    return lambda: cast(Tensor, transposed(first, *arrays, None, packed.shape[0], "none"))


def of_few(packed: ShuffledBlock, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What multiplies x, of few tokens, by values of `packed`, and the values."""
    *indices, values, ends = (t.to(x.device) for t in tiled(packed))
    return lambda v: cast(Tensor, few(x, *indices, v, ends, packed.shape[0]).sum(0)), values


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What replaces `node`, a linear layer's call of `shuffled_block`. A sum is left to whoever compiles the rest."""
    stored = {name: cast(Tensor, weight_of(gm, arg(node, name))).cpu() for name in ARRAYS}
    packed = ShuffledBlock(**stored, shape=tuple(arg(node, "shape")), lanes=arg(node, "lanes"))
    values = cast(fx.Node, arg(node, "values"))
    device, name = get_tensor(gm, str(values.target)).device, str(values.target).removesuffix("_values")
    residual, activation = arg(node, "residual"), arg(node, "activation")
    arrays = [
        new_weight(gm, node, f"{name}_gpu_{n}", t.to(device)) for n, t in zip(_ARRAYS, tiled(packed), strict=True)
    ]
    call: Any = gm.graph.call_function
    with gm.graph.inserting_before(node):
        if has_few(node):
            return lower_few(gm, node, arrays)
        x, residual = (_as_it_lies(n) for n in (node.args[0], residual))
        features_first = call(aten.contiguous.default, (call(aten.movedim.int, (x, -1, 0)),))
        inside = activation if residual is None else "none"
        y = call(transposed, (features_first, *arrays, arg(node, "bias"), packed.shape[0], inside))
        y = call(aten.movedim.int, (y, 0, -1))
        if residual is not None:
            y = call(aten.add.Tensor, (y, residual))
            y = y if activation == "none" else call(ACTIVATIONS[activation], (y,))
    return cast(fx.Node, y)


def _as_it_lies(value: Any) -> Any:
    """Before it was made contiguous for a kernel that reads features side by side."""
    return value.args[0] if isinstance(value, fx.Node) and value.target is aten.contiguous.default else value


def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    *packed, out_features, activation = arguments
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    tokens = flat.shape[1]
    if tokens % ALIGNED:  # else it reads elements one by one
        flat = F.pad(flat, (0, -tokens % ALIGNED))
    run_kernel: Any = kernel
    y = run_kernel(flat, *packed, activation, out_features=out_features)
    return cast(Tensor, y[:, :tokens].reshape(out_features, *x.shape[1:]).contiguous())


def reference(x: Tensor, *arguments: Any) -> Tensor:
    """The same by `product`."""
    *packed, bias, out_features, activation = arguments
    bias = None if bias is None else bias.view(-1, *[1] * (x.dim() - 1))
    return epilogue(product(x, *packed, out_features), bias, None, activation)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty([arguments[-2], *x.shape[1:]])


torch.library.register_fake("fxsparse::shuffled_block_transposed", _fake, lib=LIBRARY)
LIBRARY.impl("shuffled_block_transposed", reference, "CompositeExplicitAutograd")
LIBRARY.impl("shuffled_block_transposed", _cuda, "CUDA")
