"""What a user hands to compile() and plan(), looked at before anything is done: each misfit is one InputError."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import InputError
from fxsparse.ir.inputs import Call
from fxsparse.module import SparseModule, memory_format

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def checked_model(model: object) -> nn.Module:
    """`model`. Raises InputError for what is no module, has no values, or is compiled or wrapped already."""
    if not isinstance(model, nn.Module):
        raise InputError("model", expected="a torch.nn.Module", got=type(model).__name__,
                         do="Pass the module itself, not its state dict or a function.")  # fmt: skip
    if isinstance(model, _PARALLEL):
        raise InputError("model", expected="the module itself", got=f"one wrapped in {type(model).__name__}",
                         do="Pass model.module, and masks without 'module.' in their names.")  # fmt: skip
    for name, part in model.named_modules():
        if isinstance(part, SparseModule):
            raise InputError("model", expected="a model that is not compiled yet",
                             got=f"a SparseModule{f' as its part {name!r}' if name else ''}",
                             do="Compile the original model with all of its masks at once.")  # fmt: skip
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _check_tensor(name, tensor)
    return model


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise InputError(f"parameter {name!r}", expected="a value", got="a lazy one that has none yet",
                         do="Run the model once, then compile it.")  # fmt: skip
    if tensor.is_inference():
        raise InputError(f"tensor {name!r} of the model", expected="an ordinary tensor",
                         got="one made under torch.inference_mode(), which torch.export refuses",
                         do="Build or load the model outside of torch.inference_mode().")  # fmt: skip
    if tensor.is_meta:
        raise InputError(f"tensor {name!r} of the model", expected="values", got="the meta device, which has none",
                         do="Load the weights first: model.to_empty(device='cpu'), load_state_dict.")  # fmt: skip


def checked_inputs(call: Call) -> Call:
    """`call`, its tensors dense. Raises InputError without a tensor, or for a tensor of another kind."""
    if not any(isinstance(x, Tensor) for x in pytree.tree_leaves(call)):
        raise InputError("example_inputs", expected="at least one tensor", got="none",
                         do="For one image: (torch.randn(1, 3, 224, 224),).")  # fmt: skip
    seen: set[int] = set()

    def own(x: Any) -> Any:
        """A tensor that comes twice becomes two: torch.export would take both inputs for one."""
        again = id(x) in seen
        seen.add(id(x))
        dense = _dense(x)
        return dense.clone() if again and isinstance(dense, Tensor) else dense

    dense: Call = pytree.tree_map(own, call)
    return dense


@torch.inference_mode(False)
def _dense(x: Any) -> Any:
    """Contiguous or channels_last, and not an inference tensor: what torch.export and Inductor take."""
    if not isinstance(x, Tensor):
        return x
    if x.is_nested or x.layout is not torch.strided:
        raise InputError("example_inputs", expected="dense tensors",
                         got="a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}",
                         do="Pad a nested tensor, make a sparse one dense: x.to_dense().")  # fmt: skip
    if 0 in x.shape:
        raise InputError("example_inputs", expected="at least one sample and no empty dimension",
                         got=f"a tensor of shape {tuple(x.shape)}",
                         do="Compile with one sample; the result then accepts any batch size, 0 too.")  # fmt: skip
    return (x.clone() if x.is_inference() else x).contiguous(memory_format=memory_format(x))


def check_bool(name: str, value: object) -> None:
    """Raise InputError for a text, say, that would only count as true."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r}", expected="True or False", got=type(value).__name__,
                         do=f"Leave {name} at its default.")  # fmt: skip


def check_cache_dir(cache_dir: str | os.PathLike[str] | None) -> None:
    """Make the folder, and a file in it: found out before the minutes of work rather than after. Raises InputError."""
    if cache_dir is None:
        return
    try:
        if not isinstance(cache_dir, (str, os.PathLike)):
            raise TypeError("not a path")
        os.makedirs(cache_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except (OSError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise InputError(f"cache_dir={cache_dir!r}", expected="a folder that can be written",
                         got=f"{type(error).__name__}: {reason}",
                         do="Choose another folder, or leave cache_dir out.") from None  # fmt: skip
