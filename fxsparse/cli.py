"""The command line: `fxsparse plan | compile | bench | coarsen | demo`.

Results go to standard output, progress and errors to standard error. Exit status 0; 1 when a rewritten model failed its
verification; 2 for input that does not fit; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse import named
from fxsparse.backend import TARGETS
from fxsparse.coarsen import Coarsened, n_m, partition, refill, refill_plus, regroup, shuffled_block
from fxsparse.coarsen.given import excluded_masks
from fxsparse.coarsen.page import page
from fxsparse.contest import timings
from fxsparse.errors import FxSparseError, InputError, VerificationError, near
from fxsparse.ir.files import obstacle, replacing, writing
from fxsparse.measure import interleave
from fxsparse.package.aoti import check_suffix
from fxsparse.picture import data_uri, picture
from fxsparse.progress import progress
from fxsparse.prune import prunable

_EXAMPLES = """\
examples:
  fxsparse plan torchvision:resnet18 --masks masks.safetensors --input 1,3,224,224
  fxsparse compile models:vgg16_cifar --weights trained.pt --input 1,3,32,32 --html report.html
  fxsparse compile torchvision:resnet18 --masks pruned.pt --input 1,3,224,224 --out fast.fxsparse
  fxsparse bench fast.fxsparse
  fxsparse bench my_package.nets:small --input 8,3,64,64 --threads 1 >> rows.jsonl
  fxsparse coarsen torchvision:resnet18 --masks pruned.pt --method partition --out coarse.safetensors
  fxsparse demo --quick
"""
_MODEL = f"""\
{named.MODEL_FORMS}. A callable takes no arguments; modules are looked for in the current directory first. Without
--masks, the zeros in the weights are the masks."""


_METHODS: dict[str, Callable[..., Coarsened]] = {
    "refill": refill,
    "refill_plus": refill_plus,
    "regroup": regroup,
    "shuffled_block": shuffled_block,
    "partition": partition,
    "n_m": n_m,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except VerificationError as error:
        return _fail(error, 1)
    except FxSparseError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # `fxsparse plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be written at exit
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(error: FxSparseError, status: int) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxsparse",
        description="Takes a pruned PyTorch model and its masks, and makes the same function faster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"fxsparse {fxsparse.__version__}, torch {torch.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    planning = command("plan", _plan, "say what would be done to every weight and why, without building anything")
    compiling = command("compile", _compile, "rewrite, build, verify and time a model, then say what was gained")
    timing = command("bench", _bench, "time the dense builds and the result in turn, and print one JSON row for each")
    for each in (planning, compiling, timing):
        _add_model_arguments(each)
    for each in (planning, compiling):
        each.add_argument("--html", metavar="FILE", type=_output_file, help="write the report as a page with pictures")
        each.add_argument("--json", metavar="FILE", type=_output_file, help="write the report as JSON")
    for each in (compiling, timing):
        each.add_argument(
            "--verify", metavar="WHEN", default="end",
            help="compare with the masked model at the end, after each pass, or off (default: end)",
        )  # fmt: skip
    compiling.add_argument("--out", metavar="FILE", type=_output_file, help="save the result, for fxsparse.load")
    compiling.add_argument("--aoti", metavar="FILE", type=_pt2_file, help="compile it into a .pt2 with AOTInductor")
    for each in (compiling, timing):
        each.add_argument(
            "--native", action="store_true",
            help="save compiled code in the package too; for bench, run it: only for a package that you trust",
        )  # fmt: skip
    compiling.add_argument("--no-measure", action="store_true", help="build without timing it against the dense builds")

    coarsening = command(
        "coarsen", _coarsen, "turn masks into masks that run fast; this changes the function, so train"
    )
    _add_coarsen_arguments(coarsening)

    demo = command("demo", _demo, "train, prune, compile and time a small network, and write a report")
    demo.add_argument("--out", metavar="DIR", default="fxsparse-demo", help="folder to write to (default: %(default)s)")
    demo.add_argument("--seed", metavar="N", type=_seed, default=0, help="seed of everything random (default: 0)")
    demo.add_argument("--quick", action="store_true", help="train less: seconds instead of minutes")
    return parser


def _add_coarsen_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--masks", metavar="FILE", help="masks or a pruned checkpoint: see docs/readers.md")
    _add_weights(parser)
    parser.add_argument(
        "--method", metavar="NAME", required=True, help=f"how rows and columns are chosen: {', '.join(_METHODS)}"
    )
    parser.add_argument("--out", metavar="FILE", type=_output_file, required=True, help=".safetensors file to write")
    parser.add_argument(
        "--group-rows", metavar="N", type=_group_rows,
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
    parser.add_argument("--html", metavar="FILE", type=_output_file, help="write a page with pictures of the masks")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="FILE",
        help="state dict, .safetensors or .pt (default: those of a checkpoint given as --masks; else the model's own)",
    )  # fmt: skip


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--masks", metavar="FILE", help="masks or a pruned checkpoint: see docs/readers.md")
    _add_weights(parser)
    parser.add_argument(
        "--input", metavar="SHAPE", dest="shapes", type=named.parse_shape, action="append", default=[],
        help="shape of an input, such as 1,3,224,224; once for each argument of the model",
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
        "--threads", metavar="N", type=_threads, help="CPU threads to run and time with (default: torch's)"
    )


def _plan(arguments: argparse.Namespace) -> None:
    with progress():
        model, masks, inputs = _load(arguments)
        report = fxsparse.plan(model, masks, inputs, target=arguments.target)
    _write(report, arguments)


def _compile(arguments: argparse.Namespace) -> None:
    if arguments.native and arguments.out is None:
        raise InputError("--native", expected="--out FILE with it", got="no package to put the code in",
                         do="Add --out fast.fxsparse, or leave --native out.")  # fmt: skip
    module = _build(arguments, measure=not arguments.no_measure)
    _write(module.report, arguments)
    with progress():
        if arguments.out is not None:
            module.save(arguments.out, native=arguments.native)
        if arguments.aoti is not None:
            module.save_aoti(arguments.aoti)


def _bench(arguments: argparse.Namespace) -> None:
    if Path(arguments.model).is_file():
        _bench_package(arguments)
        return
    if Path(arguments.model).suffix == ".fxsparse":
        raise InputError(f"package {arguments.model!r}", expected="a file that --out wrote", got="no such file",
                         do="fxsparse compile ... --out fast.fxsparse writes one.")  # fmt: skip
    report = _build(arguments, measure=True).report
    common = {
        "model": arguments.model,
        "inputs": [list(shape) for shape in arguments.shapes],
        "dtype": str(arguments.dtype).removeprefix("torch."),
        "target": arguments.target,
    }
    after = {"speedup": report.speedup, "environment": dict(report.environment)}
    for timing in report.timings:
        print(json.dumps({**common, **dataclasses.asdict(timing), **after}))


def _bench_package(arguments: argparse.Namespace) -> None:
    given = {"--input": arguments.shapes, "--masks": arguments.masks, "--weights": arguments.weights,
             "--dtype": arguments.dtype != torch.float32, "--target": arguments.target != "inductor"}  # fmt: skip
    for flag in [flag for flag, value in given.items() if value]:
        raise InputError(f"{flag} of bench", expected="none with a package", got="one",
                         do="A package is timed as it was compiled: compile it anew for other inputs.")  # fmt: skip
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with progress():
        module = fxsparse.load(arguments.model, native=arguments.native)
        inputs = module.example_inputs
        runs = interleave({"package": lambda: module(*inputs)})
    (timing,) = timings(runs)
    environment = {key: value for key, value in module.report.environment.items() if key == "inputs"}
    print(
        json.dumps({"model": arguments.model, **environment, **dataclasses.asdict(timing), "torch": torch.__version__})
    )


def _demo(arguments: argparse.Namespace) -> None:
    from fxsparse import demo

    demo.run(arguments.out, arguments.seed, arguments.quick)


def _coarsen(arguments: argparse.Namespace) -> None:
    method = _METHODS.get(arguments.method)
    if method is None:
        raise InputError(
            "--method",
            expected=f"one of {', '.join(_METHODS)}",
            got=repr(arguments.method),
            do=near(arguments.method, _METHODS) or "--method partition keeps the most of the weights.",
        )
    with progress():
        model, given = _model_and_masks(arguments)
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
        _write_text(arguments.html, text)


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
    return _whole_number("--pattern", n, least=1), _whole_number("--pattern", m, least=2)


def _draw(mask: Tensor) -> str:
    return data_uri(picture(mask))


def _build(arguments: argparse.Namespace, measure: bool) -> fxsparse.SparseModule:
    with progress():
        model, masks, inputs = _load(arguments)
        return fxsparse.compile(
            model, masks, arguments.target, example_inputs=inputs, verify=arguments.verify, measure=measure
        )


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, fxsparse.Masks | None, tuple[Tensor, ...]]:
    if not arguments.shapes:
        raise InputError(
            "--input",
            expected="the shape of each input of the model",
            got="none",
            do="For one picture: --input 1,3,224,224",
        )
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, masks = _model_and_masks(arguments)
    return model.to(arguments.dtype), masks, named.random_inputs(arguments.shapes, arguments.dtype)


def _model_and_masks(arguments: argparse.Namespace) -> tuple[nn.Module, fxsparse.Masks | None]:
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


def _write_text(path: Path, text: str) -> None:
    with writing(path), replacing(path) as name:
        name.write_text(text, encoding="utf-8")


def _write(report: fxsparse.Report, arguments: argparse.Namespace) -> None:
    print(report)
    if arguments.json is not None:
        _write_text(arguments.json, json.dumps(report.to_dict(), indent=2) + "\n")
    if arguments.html is not None:
        report.to_html(arguments.html)


def _output_file(text: str) -> Path:
    """A path that can be written to, found out before the minutes of work rather than after."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"output file {text!r}", expected="a path in a folder that exists or can be made, and written to",
            got=f"{type(error).__name__}: {error.strerror}", do="Name another file.",
        ) from None  # fmt: skip
    if problem := obstacle(path):
        do = f"{text.rstrip('/')}/report, say." if path.is_dir() else "Name another file."
        raise InputError(f"output file {text!r}", expected="a file", got=problem, do=do)
    return path


def _pt2_file(text: str) -> Path:
    check_suffix(text, "--aoti")
    return _output_file(text)


def _group_rows(text: str) -> int:
    return _whole_number("--group-rows", text, least=1)


def _threads(text: str) -> int:
    return _whole_number("--threads", text, least=1)


def _seed(text: str) -> int:
    return _whole_number("--seed", text, least=0)


def _whole_number(flag: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise InputError(
            flag, expected=f"a whole number from {least} on", got=repr(text), do=f"For example: {flag} {least}"
        )
    return int(text)
