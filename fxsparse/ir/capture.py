"""A model becomes a flat graph of functional ATen: torch.export, then `run_decompositions({})`.

Composites (conv2d, linear, layer_norm, scaled_dot_product_attention) stay whole, weights are get_attr nodes under the
user's own names, `meta["val"]` holds fake tensors and `nn_module_stack` the module paths.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.errors import CaptureError, InputError, first_line
from fxsparse.ir.graph import arg, aten, clone, get_tensor, has_attribute, operator_name, owner, set_tensor
from fxsparse.ir.inputs import Call, exported
from fxsparse.ir.masks import Masks
from fxsparse.ir.quiet import tracing_quietly

_NOT_THE_USERS = tuple(str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
# Functions made of text, by torch and by fx, and what wraps a user's function.
_GENERATED = ("<string>", "<eval_with_key>", contextlib.__file__, functools.__file__)


@tracing_quietly()
def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    masks: Masks,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool,
) -> fx.GraphModule:
    """The graph of `model` with every masked weight set to zero. The model itself is not touched.

    args, kwargs   example inputs; the batch is dimension 0 of the first tensor, and of others where that is as large
    dynamic_batch  leave that dimension symbolic
    Raises CaptureError when torch.export cannot follow the model, InputError when the inputs do not fit it.
    """
    call = Call(args, dict(kwargs or {}))
    with _untouched(model):
        _refuse_nested_tensors(model)
        program = _export(model, call, dynamic_batch)
        _refuse_side_effects(program, model)
    known = "check_guards" in inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if known else program.module()
    _refuse_subgraphs(module, model)
    gm = clone(module)
    drop_assertions(gm)
    _refuse_random(gm, model)
    _own(gm)
    _apply(gm, masks, model)
    _run_once(gm, model, call)
    return gm


def masked_output(model: nn.Module, masks: Masks, call: Call) -> Any:
    """What the user's own module gives with its masked weights at zero. The module is left as it was."""
    parameters = dict(model.named_parameters())
    zeroed = {n: parameters[n].detach().masked_fill(~m.to(parameters[n].device), 0) for n, m in masks.items()}
    with _untouched(model), torch.no_grad():
        return torch.func.functional_call(model, zeroed, call.args, dict(call.kwargs))


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and slow paths inside; afterwards every module has its own attributes back, and their contents.

    Tracing runs the model on fake tensors: torch.nn.utils.prune and weight_norm would leave theirs behind, a model's
    own caches would be full of them, and hooks that it adds to itself would be there twice.
    """
    contents: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _remember(module.__dict__, contents)
    try:
        _evaluate(model)
        with _slow_paths():
            yield
    finally:
        for container, before in contents.values():
            _restore(container, before)


@contextlib.contextmanager
def _slow_paths() -> Iterator[None]:
    """nn.Transformer runs as torch.export traces it: without its fused layers, and with no look at a mask's values.

    PyTorch looks whether a mask is the causal one, to leave it out then: applying it is the same function.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    detect = torch.nn.modules.transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    torch.nn.modules.transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.nn.modules.transformer._detect_is_causal_mask = detect


def _refuse_nested_tensors(model: nn.Module) -> None:
    """Hooks, dropped by `_untouched`, that raise where PyTorch without gradients gives zeros at padded positions."""

    def refuse(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("src", "mask", "src_key_padding_mask"), args, strict=False)), **kwargs}
        padded = given.get("src_key_padding_mask") is not None and given.get("mask") is None
        if padded and getattr(encoder, "use_nested_tensor", False):
            got = "use_nested_tensor=True: without gradients, PyTorch leaves padded positions out and gives zeros there"
            raise _cannot(model, "an nn.TransformerEncoder that computes the same with and without gradients", got,
                          "Set encoder.use_nested_tensor = False, or leave src_key_padding_mask out.")  # fmt: skip

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.register_forward_pre_hook(refuse, with_kwargs=True)


def _remember(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Containers by id, each with a copy, and what lies in them. Tensors and modules are no containers here."""
    if isinstance(value, (dict, list, set)) and id(value) not in contents:
        contents[id(value)] = value, list(value.items()) if isinstance(value, dict) else list(value)
    elif not isinstance(value, tuple):
        return
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list, set, tuple)):
            _remember(inner, contents)


def _restore(container: Any, before: list[Any]) -> None:
    container.clear()
    container.extend(before) if isinstance(container, list) else container.update(before)


def _evaluate(model: nn.Module) -> None:
    try:
        model.eval()
    except Exception as error:  # noqa: BLE001 - torch.export's modules refuse; a user's own may raise anything
        got = f"one whose eval() raises {first_line(error)}"
        advice = "Compile the model that was exported rather than what torch.export made of it."
        raise _cannot(model, "a model with an evaluation mode", got, advice) from None


def _export(model: nn.Module, call: Call, dynamic_batch: bool) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            program = exported(model, call, dynamic_batch=dynamic_batch)
            flat: torch.export.ExportedProgram = program.run_decompositions({})
            return flat
    except CaptureError:  # of our own hooks
        raise
    except Exception as error:  # noqa: BLE001 - whatever torch.export raises becomes our error, with its text
        raise _explain(model, call, error, dynamic_batch) from None


def _explain(model: nn.Module, call: Call, error: Exception, dynamic_batch: bool) -> Exception:
    """InputError for a model that does not run on its inputs; CaptureError for one that runs and cannot be exported."""
    name = type(model).__name__
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    except Exception as cause:  # noqa: BLE001 - the model is the user's: it may raise anything
        return InputError(
            f"example_inputs for {name}",
            expected="inputs the model itself accepts",
            got=f"{_describe(call)}, and the model raises {first_line(cause)}",
            do="Pass what the model is called with: a tuple for model(*example_inputs), or a dict for "
            "model(**example_inputs).",
        )
    line = _users_line(error)
    part = "that line" if line else "the part that it cannot follow"
    advice = (
        f"Rewrite {part} without data-dependent Python, compile the submodules that export, or use "
        "torch.compile(model, backend='fxsparse'), which compiles what it can follow."
    )
    if "transformers.cache_utils" in str(error):
        advice = 'A cache is no tensor: set model.config.use_cache = False, or give "use_cache": False by name.'
    elif dynamic_batch and _exports(model, call):
        advice = "It can at one batch size: pass dynamic_batch=False. For any, see what the error says of sizes."
    got = first_line(error) + (f", at {line}" if line else "")
    return _cannot(model, "a model that torch.export can follow (strict=False)", got, advice)


def _users_line(error: Exception) -> str:
    """`model.py:14 in forward`, the last line of neither torch's nor ours that led to the error; empty without one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_NOT_THE_USERS, *_GENERATED)):
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return ""


def _exports(model: nn.Module, call: Call) -> bool:
    """Whether torch.export can follow the model at the example's sizes."""
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            exported(model, call, dynamic_batch=False)
    except Exception:  # noqa: BLE001 - as in `_export`
        return False
    return True


def _cannot(model: nn.Module, expected: str, got: str, do: str) -> CaptureError:
    return CaptureError(f"capture of {type(model).__name__}", expected=expected, got=got, do=do)


def _refuse_side_effects(program: torch.export.ExportedProgram, model: nn.Module) -> None:
    """A graph that writes to its buffers or inputs gives another result at the next run: nothing could be compared."""
    signature = program.graph_signature
    written = [*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()]
    if written:
        raise _cannot(model, "a forward without side effects", f"one that changes {', '.join(map(repr, written))}",
                      "Compute the new value without storing it, or keep the state outside of the model.")  # fmt: skip
    if signature.user_inputs_to_mutate:
        names = ", ".join(map(repr, signature.user_inputs_to_mutate.values()))
        raise _cannot(model, "a forward without side effects", f"one that writes to its input {names}",
                      "Begin with x = x.clone(), or use the operator that is not in-place.")  # fmt: skip


def _refuse_subgraphs(gm: nn.Module, model: nn.Module) -> None:
    for node in gm.graph.nodes:  # type: ignore[union-attr]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise _cannot(model, "one flat graph", f"the control flow operator {node.target}",
                          "Compile the submodules around it, or write both branches and torch.where.")  # fmt: skip


def _refuse_random(gm: fx.GraphModule, model: nn.Module) -> None:
    for node in gm.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and draws(node):
            got = f"the random operator {operator_name(node)} in {owner(node)}"
            raise _cannot(
                model,
                "a model whose output depends on its input alone",
                got,
                "Draw the numbers outside and pass them in; F.dropout needs training=self.training.",
            )


def _run_once(gm: fx.GraphModule, model: nn.Module, call: Call) -> None:
    """Fake tensors let some wrong dtypes pass that the kernels refuse."""
    try:
        with torch.no_grad():
            gm(*call.args, **call.kwargs)
    except Exception as error:  # noqa: BLE001 - whatever the model's operators raise
        with _untouched(model):
            explained = _explain(model, call, error, dynamic_batch=False)
        raise explained from None


def draws(node: fx.Node) -> bool:
    """Dropout and its kin draw nothing at inference or with probability 0."""
    names = {p.name for p in node.target._schema.arguments}  # type: ignore[union-attr]
    training = [bool(arg(node, n)) for n in ("train", "training") if n in names]
    probability = [arg(node, n) for n in ("p", "dropout_p", "dropout") if n in names]
    return all(training) and not (probability and probability[0] in (0, None))


def _own(gm: fx.GraphModule) -> None:
    """Copies of all tensors, tied ones still tied.

    An optimizer step or load_state_dict on the user's model writes in place, and must not reach the result.
    """
    copies: dict[tuple[object, ...], Tensor] = {}
    for target in {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}:
        tensor = get_tensor(gm, target)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in copies:
            copies[key] = tensor.detach().clone()
        set_tensor(gm, target, copies[key])


def _describe(call: Call) -> str:
    def shown(x: Any) -> str:
        return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__

    return "(" + ", ".join([*map(shown, call.args), *(f"{name}={shown(x)}" for name, x in call.kwargs.items())]) + ")"


def drop_assertions(gm: fx.GraphModule) -> None:
    """Erase the checks of dtypes and devices that tracing leaves behind."""
    for node in list(gm.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)


def _apply(gm: fx.GraphModule, masks: Masks, model: nn.Module) -> None:
    """Store masked copies under the graph's own names; a tied parameter may carry any of its names here."""
    aliases: Mapping[int, str] = {id(p): n for n, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    for target in {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}:
        parameter = every.get(target)
        name = aliases.get(id(parameter), target) if parameter is not None else target
        if name in masks and parameter is not None and has_attribute(gm, target):
            weight = parameter.detach()
            set_tensor(gm, target, weight.masked_fill(~masks[name].to(weight.device), 0))
