"""Arguments that several commands take: the model with its masks, weights and inputs, and files to write."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxsparse
from fxsparse.backend import TARGETS
from fxsparse.cli import named
from fxsparse.errors import InputError
from fxsparse.formats import FORMATS
from fxsparse.ir.files import whole_file, writable
from fxsparse.package.aoti import check_suffix

_MODEL = f"""\
{named.MODEL_FORMS}. A callable takes no arguments; modules are looked for in the current directory first. Without
--masks, the zeros in the weights are the masks."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, its masks and its weights."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--masks", metavar="FILE", help="masks or a pruned checkpoint: see docs/readers.md")
    parser.add_argument(
        "--weights", metavar="FILE",
        help="state dict, .safetensors or .pt (default: those of a checkpoint given as --masks; else the model's own)",
    )  # fmt: skip


def add_run(parser: argparse.ArgumentParser) -> None:
    """What the model is called with, and what runs it."""
    parser.add_argument(
        "--input", metavar="SHAPE", dest="inputs", type=named.parse_input, action="append", default=[],
        help="shape of an input, such as 1,3,224,224; of token ids, with the number of them: 1,128:50257; "
        "once for each argument of the model, with names where it is called by them: input_ids=1,128:50257",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", metavar="NAME", type=named.parse_dtype, default=torch.float32,
        help=f"of weights and inputs: {', '.join(named.DTYPES)} (default: float32)",
    )  # fmt: skip
    parser.add_argument(
        "--target",
        metavar="NAME",
        default="inductor",
        help=f"what runs the result: {', '.join(TARGETS)} (default: inductor)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=whole_number("--threads", 1),
        help="CPU threads to run and time with (default: torch's)",
    )
    parser.add_argument(
        "--fixed-batch", action="store_true",
        help="for the batch size of --input alone (dynamic_batch=False), where the model takes no other",
    )  # fmt: skip


def add_build(parser: argparse.ArgumentParser) -> None:
    """How the result is built."""
    parser.add_argument(
        "--verify", metavar="WHEN", default="end",
        help="compare with the masked model at the end, after each pass, or off (default: end)",
    )  # fmt: skip
    parser.add_argument(
        "--formats", metavar="NAME", default="auto",
        help=f"how weights are stored: auto, dense or, where it saves work, {', '.join(FORMATS)} (default: auto)",
    )  # fmt: skip
    parser.add_argument("--cache-dir", metavar="DIR", help="folder that keeps the measured times of layers")


def load(arguments: argparse.Namespace) -> tuple[nn.Module, fxsparse.Masks | None, named.Inputs]:
    """Model, masks where they are given, and inputs. Raises InputError or MaskError for what does not fit."""
    if not arguments.inputs:
        raise InputError(
            "--input",
            expected="the shape of each input of the model",
            got="none",
            do="For one picture: --input 1,3,224,224. For 128 of 50257 token ids: --input 1,128:50257",
        )
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, masks = model_and_masks(arguments)
    return model.to(arguments.dtype), masks, named.random_inputs(arguments.inputs, arguments.dtype)


def model_and_masks(arguments: argparse.Namespace) -> tuple[nn.Module, fxsparse.Masks | None]:
    """The model with the weights of --weights or else of --masks, where that is a whole checkpoint."""
    given = None if arguments.masks is None else fxsparse.read(arguments.masks)
    model = named.load_model(arguments.model)
    if arguments.weights is not None:
        named.load_weights(model, arguments.weights)
    elif given is not None and given.weights is not None:
        named.set_weights(model, given.weights, f"checkpoint {arguments.masks!r}")
    elif arguments.model.startswith(named.UNTRAINED):
        print(f"note: the weights of {arguments.model} are random; --weights FILE loads yours", file=sys.stderr)
    return model, given.masks if given is not None else None


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it. Raises InputError where it cannot be written."""
    with whole_file(path) as name:
        name.write_text(text, encoding="utf-8")


def say_written(*paths: Path | None) -> None:
    """A line on standard error for each file."""
    for path in paths:
        if path is not None:
            print(f"wrote {path}", file=sys.stderr)


def file_like(name: str) -> Callable[[str], Path]:
    """Reads a path to write to. Raises InputError where it cannot be; `name` is what such a file may be called."""
    return functools.partial(writable, like=name)


def pt2_file(text: str) -> Path:
    """A path for AOTInductor's package."""
    check_suffix(text, "--aoti")
    return writable(text, "model.pt2")


def whole_number(flag: str, least: int) -> Callable[[str], int]:
    """Reads the value of `flag`. Raises InputError unless it is a whole number from `least` on."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise InputError(
                flag, expected=f"a whole number from {least} on", got=repr(text), do=f"For example: {flag} {least}"
            )
        return int(text)

    return read
