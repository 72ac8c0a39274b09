"""Models, weights and inputs as the command line names them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxsparse.errors import InputError, first_line, near
from fxsparse.ir.masks import fit_names
from fxsparse.readers import torch_prune
from fxsparse.readers.files import are_tensors, failure, stored, unwrapped

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
UNTRAINED = ("torchvision:", "models:")  # sources of models whose weights are random
MODEL_FORMS = "torchvision:resnet18, models:vgg16_cifar or package.module:callable"


def load_model(name: str) -> nn.Module:
    """The model that `name` names, in eval mode, its random weights the same in every run.

    torchvision:NAME    one of torchvision's models, untrained; nothing is downloaded
    MODULE:CALLABLE     a class or function that takes no arguments, or a module made already; the current directory
                        is looked in first, so `models:vgg16_cifar` works in a checkout
    Raises InputError for a name of another form, for one that does not exist, and for one that is not a model.
    """
    refuse_folder(name)
    source, _, attribute = name.partition(":")
    if not source or not attribute:
        raise InputError(
            f"model {name!r}",
            expected=MODEL_FORMS,
            got="a name without a source" if ":" not in name else "a name with an empty part",
            do=f"For a model of torchvision: torchvision:{attribute or source or 'resnet18'}",
        )
    torch.manual_seed(0)  # for modules made while theirs is imported
    model = _torchvision_model(name, attribute) if source == "torchvision" else _own_model(name, source, attribute)
    return model.eval()


def refuse_folder(name: str) -> None:
    """Raises InputError for a folder in the place of a model."""
    if Path(name).is_dir() and ":" not in name:
        raise InputError(
            f"model {name!r}",
            expected=MODEL_FORMS,
            got="a folder",
            do="Name a callable of a module in it, or for bench a package, the file that compile --out wrote.",
        )


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict, .safetensors or .pt, into `model`. Raises InputError unless names and shapes all fit.

    One inside of a training checkpoint is found; one under torch.nn.utils.prune fits a model that is not, masked.
    """
    where = f"weights file {path!r}"
    state = _read_state(where, path)
    if torch_prune.recognizes(state) and not torch_prune.recognizes(model.state_dict()):
        state = torch_prune.read(state, where).weights or {}
    set_weights(model, state, where)


def set_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """The tensors of `state`, which come from `where`, into `model`. Raises InputError unless all fit."""
    own = model.state_dict()
    state = _with_other_names(own, fit_names(state, own), where)
    missing, unknown = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or unknown:
        first, others = (unknown[0], missing) if unknown else (missing[0], unknown)
        raise InputError(
            where,
            expected=f"the model's {len(own)} tensors",
            got=f"{len(missing)} of them missing and {len(unknown)} unknown ones; the first is {first!r}",
            do=near(first, others) or "Was it saved from another model?",
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise InputError(
                f"{where}, {key!r}",
                expected=f"shape {tuple(tensor.shape)}",
                got=str(tuple(state[key].shape)),
                do="Was it saved from a model of another size?",
            )
    model.load_state_dict(dict(state))


def _with_other_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Files of safetensors hold a tied parameter under one of its names. InputError where two have other values."""
    given: dict[tuple[int, torch.Size], str] = {}
    complete = dict(state)
    for name, tensor in own.items():
        if name in state and tensor.numel():
            first = given.setdefault((tensor.data_ptr(), tensor.shape), name)
            if not torch.equal(state[first], state[name]):
                raise InputError(
                    where,
                    expected=f"one value for {first!r} and {name!r}, which are one parameter of the model",
                    got="two",
                    do="Was it saved from a model that does not tie them? Untie them in this one too.",
                )
    for name, tensor in own.items():
        other = given.get((tensor.data_ptr(), tensor.shape))
        if name not in state and other is not None:
            complete[name] = state[other]
    return complete


Inputs = tuple[Tensor, ...] | dict[str, Tensor]


class Input(NamedTuple):
    """An input by its shape: of numbers in the model's dtype, or of int64 from 0 to `below` - 1, such as token ids."""

    shape: tuple[int, ...]
    below: int | None = None
    name: str = ""


def parse_input(text: str) -> Input:
    """`1,3,224,224`, `1,128:50257` or `input_ids=1,128:50257`. Raises InputError unless its numbers are positive."""
    *named, given = text.split("=", 1)
    shape, colon, below = given.partition(":")
    numbers = [number.strip() for number in shape.split(",") + [below] * bool(colon)]
    if named and not named[0].strip().isidentifier():
        raise InputError(f"--input {text}", expected="a name of the model's parameter before =", got=repr(named[0]),
                         do="--input input_ids=1,128:50257, or leave the name out.")  # fmt: skip
    wrong = [number for number in numbers if not (number.isascii() and number.isdigit() and int(number) > 0)]
    if wrong:
        raise InputError(
            f"--input {text}",
            expected="positive whole numbers with commas between",
            got=f"{wrong[0]!r} for one of them",
            do="For one picture: --input 1,3,224,224. For 128 of 50257 token ids: --input 1,128:50257",
        )
    sizes = [int(number) for number in numbers]
    name = named[0].strip() if named else ""
    return Input(tuple(sizes[:-1]), sizes[-1], name) if colon else Input(tuple(sizes), name=name)


def parse_dtype(text: str) -> torch.dtype:
    """One of DTYPES by its name. Raises InputError for another."""
    if text not in DTYPES:
        raise InputError(
            "--dtype",
            expected=", ".join(DTYPES),
            got=repr(text),
            do=near(text, DTYPES) or "--dtype float32 is the default.",
        )
    return DTYPES[text]


def random_inputs(inputs: Sequence[Input], dtype: torch.dtype) -> Inputs:
    """Normally distributed inputs and evenly distributed ids, the same in every run; a dict where they have names.

    Raises InputError when they do not fit into memory, an id not into int64, or only some have names.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        made = tuple(
            torch.randn(shape, generator=generator).to(dtype)
            if below is None
            else torch.randint(below, shape, generator=generator)
            for shape, below, _ in inputs
        )
    except (RuntimeError, ValueError, TypeError) as error:  # torch says it in one of these ways
        raise InputError("--input", expected="shapes that fit into memory and ids into int64", got=first_line(error),
                         do="A batch of one is enough, and an embedding has fewer rows.") from None  # fmt: skip
    named = {given.name: x for given, x in zip(inputs, made, strict=True) if given.name}
    if named and len(named) < len(inputs):
        raise InputError("--input", expected="a name for every input, each another, or none at all",
                         got=f"{len(named)} different names for {len(inputs)} inputs",
                         do="--input input_ids=1,128:50257 --input attention_mask=1,128:2")  # fmt: skip
    return named or made


def _torchvision_model(name: str, attribute: str) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise InputError(
            f"model {name!r}", expected="torchvision", got=str(error), do="pip install 'fxsparse[demo]' brings it."
        ) from None
    known = models.list_models()
    if attribute not in known:
        raise InputError(
            f"model {name!r}",
            expected=f"one of torchvision's {len(known)} models",
            got=f"{attribute!r}, which is none of them",
            do=near(attribute, known) or f"They are listed by torchvision.models.list_models(), from {known[0]!r} on.",
        )
    builder = models.get_model_builder(attribute)
    # Detection and segmentation models fetch a trained backbone unless told not to.
    names = [n for n in ("weights", "weights_backbone", "init_weights") if n in inspect.signature(builder).parameters]
    return _model_from(name, lambda: builder(**{n: None if n != "init_weights" else True for n in names}))


def _own_model(name: str, source: str, attribute: str) -> nn.Module:
    module = _import(name, source)
    public = [n for n in vars(module) if not n.startswith("_")]
    made = getattr(module, attribute, None)
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        raise InputError(
            f"model {name!r}",
            expected=f"a model, or a callable that makes one, in {source}",
            got="no such name" if not hasattr(module, attribute) else f"a {type(made).__name__}",
            do=near(attribute, [n for n in public if callable(getattr(module, n))]) or _where(module),
        )
    needed = _needed_arguments(made)
    if needed:
        raise InputError(
            f"model {name!r}",
            expected="a callable that needs no arguments",
            got=f"one that needs {', '.join(needed)}",
            do="Wrap it: def mine(): return ... in a file of yours, then FILE:mine without .py.",
        )
    return _model_from(name, made)


def _import(name: str, source: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # stays: a model may import its neighbors when it is built
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        absent = error.name or source
        own = source == absent or source.startswith(f"{absent}.")
        raise InputError(
            f"model {name!r}",
            expected=f"a module {source}, installed or below the current directory",
            got="no such module" if own else f"one that imports {absent}, which is not installed",
            do=_module_hint(source, absent) if own else f"pip install {absent.split('.')[0]}, perhaps.",
        ) from None
    except Exception as error:
        raise InputError(
            f"model {name!r}",
            expected=f"a module {source} that can be imported",
            got=_failure(error),
            do=f"To see where: python -c 'import {source}'",
        ) from error


def _model_from(name: str, make: Callable[[], object]) -> nn.Module:
    torch.manual_seed(0)
    try:
        model = make()
    except Exception as error:
        raise InputError(
            f"model {name!r}",
            expected="a callable that makes a model",
            got=_failure(error),
            do="Mend it, then try again.",
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model {name!r}",
            expected="a torch.nn.Module",
            got=f"a callable that returned a {type(model).__name__}",
            do="Name a class derived from torch.nn.Module, or a function that returns one.",
        )
    return model


def _read_state(where: str, path: str) -> Mapping[str, Tensor]:
    try:
        loaded = stored(Path(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            where,
            expected="a readable state dict, .safetensors or .pt",
            got=failure(error),
            do="Write one with torch.save(model.state_dict(), path). Files that could run code are not read.",
        ) from error
    if isinstance(loaded, dict) and are_tensors(loaded := unwrapped(loaded)):
        return loaded
    inner = [k for k, v in loaded.items() if isinstance(v, dict)] if isinstance(loaded, dict) else []
    raise InputError(
        where,
        expected="a state dict, tensors by name",
        got=f"a {type(loaded).__name__}" + (f" with {', '.join(map(repr, inner))} inside" if inner else ""),
        do=f"Save that part alone: torch.save(checkpoint[{inner[0]!r}], path)."
        if inner
        else "Write one with torch.save(model.state_dict(), path).",
    )


def _needed_arguments(make: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # some built-in callables have no signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _module_hint(source: str, absent: str) -> str:
    if source == "models":
        return "models/ is in fxsparse's repository, not in the package: run this in a checkout."
    if absent == source and Path(source).suffix == ".py":
        return f"Leave out .py: {source.removesuffix('.py')}"
    return f"The current directory is {os.getcwd()}."


def _where(module: ModuleType) -> str:
    return f"It was looked for in {module.__file__ or module.__name__}."


def _failure(error: Exception) -> str:
    """`ValueError: too deep (nets.py:12)`, with the line of the user's code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    if isinstance(error, SyntaxError) or len(frames) < 2:
        return first_line(error)
    return f"{first_line(error)} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
