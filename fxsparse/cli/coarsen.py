"""`fxsparse coarsen`: masks -> masks that run fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.cli.options import add_model, file_like, model_and_masks, say_written, whole_number, write_text
from fxsparse.coarsen import Coarsened, n_m, partition, refill, refill_plus, regroup, shuffled_block
from fxsparse.coarsen.given import excluded_masks
from fxsparse.coarsen.page import page
from fxsparse.errors import InputError, near
from fxsparse.picture import data_uri, picture
from fxsparse.progress import progress
from fxsparse.prune import prunable

_METHODS: dict[str, Callable[..., Coarsened]] = {
    "refill": refill,
    "refill_plus": refill_plus,
    "regroup": regroup,
    "shuffled_block": shuffled_block,
    "partition": partition,
    "n_m": n_m,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this command."""
    add_model(parser)
    parser.add_argument(
        "--method", metavar="NAME", required=True, help=f"how rows and columns are chosen: {', '.join(_METHODS)}"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=file_like("masks.safetensors"), required=True,
        help="file of safetensors to write",
    )  # fmt: skip
    parser.add_argument(
        "--group-rows", metavar="N", type=whole_number("--group-rows", 1),
        help="rows that share columns: of a group, tile or block (default: the method's own, 32 or 16)",
    )  # fmt: skip
    parser.add_argument(
        "--pattern", metavar="N:M", type=_pattern,
        help="of n_m: weights kept of how many neighboring input channels (default: 2:4)",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", metavar="NAME", action="append", default=[],
        help="a module or parameter whose mask is to stay as it is; may be given again",
    )  # fmt: skip
    html = file_like("masks.html")
    parser.add_argument("--html", metavar="FILE", type=html, help="write a page with pictures of the masks")


def run(arguments: argparse.Namespace) -> None:
    """Coarsen, print what changed, and write the masks."""
    method = _METHODS.get(arguments.method)
    if method is None:
        raise InputError(
            "--method",
            expected=f"one of {', '.join(_METHODS)}",
            got=repr(arguments.method),
            do=near(arguments.method, _METHODS) or "--method partition keeps the most of the weights.",
        )
    with progress():
        model, given = model_and_masks(arguments)
        masks = given.check(model) if given is not None else _masks_of(model)
        options = _rows_of_a_group(arguments) | _pattern_options(arguments)
        if arguments.method == "n_m" and given is None:  # weights without zeros take part
            ones = {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(model).items()}
            masks = fxsparse.Masks({**ones, **masks})
        if not masks:
            raise InputError("--masks", expected="masks, or zeros in the model's weights", got="neither",
                             do="Pass --masks FILE, or --weights FILE with the pruned weights.")  # fmt: skip
        aside = excluded_masks(masks, arguments.exclude) if arguments.method != "n_m" else set()
        kept = {name: mask for name, mask in masks.items() if name in aside}
        masks = fxsparse.Masks({name: mask for name, mask in masks.items() if name not in aside})
        found = method(dict(model.named_parameters()), masks, **options)
    print(found)
    fxsparse.Masks({**found.masks, **kept}).save(arguments.out)
    if arguments.html is not None:
        text = page(found, masks, f"fxsparse coarsen: {arguments.model}, {arguments.method}", _draw)
        write_text(arguments.html, text)
    say_written(arguments.out, arguments.html)


def _masks_of(model: nn.Module) -> fxsparse.Masks:
    """What torch.nn.utils.prune left, or the zeros in weights: a bias or a norm may begin as zeros."""
    zeros = fxsparse.Masks.from_zeros(model)
    return fxsparse.Masks.from_prune(model) or fxsparse.Masks({n: m for n, m in zeros.items() if m.dim() > 1})


def _rows_of_a_group(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {"partition": "group_rows", "regroup": "row_tile", "shuffled_block": "block"}
    if arguments.group_rows is None:
        return {}
    if arguments.method not in names:
        raise InputError(
            "--group-rows", expected=f"it with {', '.join(names)}", got=f"it with {arguments.method}",
            do="Leave it out: whole rows are kept, not groups.",
        )  # fmt: skip
    return {names[arguments.method]: arguments.group_rows}


def _pattern_options(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.method == "n_m":
        n, m = arguments.pattern or (2, 4)
        return {"n": n, "m": m, "exclude": arguments.exclude}
    if arguments.pattern:
        raise InputError("--pattern", expected="it with n_m", got=f"it with {arguments.method}",
                         do="Leave it out: the other methods keep row groups.")  # fmt: skip
    return {}


def _pattern(text: str) -> tuple[int, int]:
    n, _, m = text.partition(":")
    if text.count(":") != 1:
        raise InputError("--pattern", expected="N:M", got=repr(text), do="For example: --pattern 2:4")
    return whole_number("--pattern", 1)(n), whole_number("--pattern", 2)(m)


def _draw(mask: Tensor) -> str:
    return data_uri(picture(mask))
