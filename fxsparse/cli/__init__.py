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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fxsparse
from fxsparse.cli import coarsen, named, options
from fxsparse.cli.said import said
from fxsparse.contest import timings
from fxsparse.errors import FxSparseError, InputError, VerificationError
from fxsparse.measure import interleave
from fxsparse.progress import progress

_EXAMPLES = """\
examples:
  fxsparse plan torchvision:resnet18 --masks masks.safetensors --input 1,3,224,224
  fxsparse compile models:vgg16_cifar --weights trained.pt --input 1,3,32,32 --html report.html
  fxsparse compile torchvision:resnet18 --masks pruned.pt --input 1,3,224,224 --out fast.fxsparse
  fxsparse bench fast.fxsparse
  fxsparse bench my_package.nets:small --input 8,3,64,64 --threads 1 >> rows.jsonl
  fxsparse coarsen torchvision:resnet18 --masks pruned.pt --method partition --out coarse.safetensors
  fxsparse plan my_package.nets:gpt --masks pruned.pt --input 1,128:50257
  fxsparse plan my_package.nets:bert --masks pruned.pt --input input_ids=1,128:30522 --input attention_mask=1,128:2
  fxsparse demo --quick
"""


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
    print(f"{type(error).__name__}: {said(error)}", file=sys.stderr)
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
        options.add_model(each)
        options.add_run(each)
    for each in (planning, compiling):
        html, of_json = options.file_like("report.html"), options.file_like("report.json")
        each.add_argument("--html", metavar="FILE", type=html, help="write the report as a page with pictures")
        each.add_argument("--json", metavar="FILE", type=of_json, help="write the report as JSON")
    for each in (compiling, timing):
        options.add_build(each)
    package = options.file_like("fast.fxsparse")
    compiling.add_argument("--out", metavar="FILE", type=package, help="save the result, for fxsparse.load")
    compiling.add_argument(
        "--aoti", metavar="FILE", type=options.pt2_file, help="compile it into a .pt2 with AOTInductor"
    )
    for each in (compiling, timing):
        each.add_argument(
            "--native", action="store_true",
            help="save compiled code in the package too; for bench, run it: only for a package that you trust",
        )  # fmt: skip
    compiling.add_argument("--no-measure", action="store_true", help="build without timing it against the dense builds")

    coarsening = command(
        "coarsen", coarsen.run, "turn masks into masks that run fast; this changes the function, so train"
    )
    coarsen.add_arguments(coarsening)

    demo = command("demo", _demo, "train, prune, compile and time a small network, and write a report")
    demo.add_argument("--out", metavar="DIR", default="fxsparse-demo", help="folder to write to (default: %(default)s)")
    demo.add_argument(
        "--seed",
        metavar="N",
        type=options.whole_number("--seed", 0),
        default=0,
        help="seed of everything random (default: 0)",
    )
    demo.add_argument("--quick", action="store_true", help="train less: seconds instead of minutes")
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    with progress():
        model, masks, inputs = options.load(arguments)
        report = fxsparse.plan(model, masks, inputs, target=arguments.target, dynamic_batch=not arguments.fixed_batch)
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
    options.say_written(arguments.out, arguments.aoti)


def _bench(arguments: argparse.Namespace) -> None:
    if Path(arguments.model).is_file():
        _bench_package(arguments)
        return
    named.refuse_folder(arguments.model)
    if Path(arguments.model).suffix == ".fxsparse":
        raise InputError(f"package {arguments.model!r}", expected="a file that --out wrote", got="no such file",
                         do="fxsparse compile ... --out fast.fxsparse writes one.")  # fmt: skip
    if arguments.native:
        raise InputError("--native of bench", expected="a package with it", got=f"the model {arguments.model!r}",
                         do="Time fast.fxsparse, which fxsparse compile --native --out wrote.")  # fmt: skip
    report = _build(arguments, measure=True).report
    common = {
        "model": arguments.model,
        "inputs": [list(given.shape) for given in arguments.inputs],
        "dtype": str(arguments.dtype).removeprefix("torch."),
        "target": arguments.target,
    }
    after = {"speedup": report.speedup, "environment": dict(report.environment)}
    for timing in report.timings:
        print(json.dumps({**common, **dataclasses.asdict(timing), **after}))


def _bench_package(arguments: argparse.Namespace) -> None:
    given = {"--input": arguments.inputs, "--masks": arguments.masks, "--weights": arguments.weights,
             "--dtype": arguments.dtype != torch.float32, "--target": arguments.target != "inductor",
             "--fixed-batch": arguments.fixed_batch, "--verify": arguments.verify != "end",
             "--formats": arguments.formats != "auto", "--cache-dir": arguments.cache_dir}  # fmt: skip
    for flag in [flag for flag, value in given.items() if value]:
        raise InputError(f"{flag} of bench", expected="none with a package", got="one",
                         do="A package is timed as it was compiled: compile it anew for other inputs.")  # fmt: skip
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with progress():
        module = fxsparse.load(arguments.model, native=arguments.native)
        args, kwargs = module.example
        runs = interleave({"package": lambda: module(*args, **kwargs)})
    (timing,) = timings(runs)
    environment = {key: value for key, value in module.report.environment.items() if key == "inputs"}
    print(
        json.dumps({"model": arguments.model, **environment, **dataclasses.asdict(timing), "torch": torch.__version__})
    )


def _demo(arguments: argparse.Namespace) -> None:
    from fxsparse import demo

    demo.run(arguments.out, arguments.seed, arguments.quick)


def _build(arguments: argparse.Namespace, measure: bool) -> fxsparse.SparseModule:
    with progress():
        model, masks, inputs = options.load(arguments)
        return fxsparse.compile(
            model, masks, arguments.target, example_inputs=inputs, dynamic_batch=not arguments.fixed_batch,
            formats=arguments.formats, verify=arguments.verify, measure=measure, cache_dir=arguments.cache_dir,
        )  # fmt: skip


def _write(report: fxsparse.Report, arguments: argparse.Namespace) -> None:
    print(report)
    if arguments.json is not None:
        options.write_text(arguments.json, json.dumps(report.to_dict(), indent=2) + "\n")
    if arguments.html is not None:
        report.to_html(arguments.html)
    options.say_written(arguments.json, arguments.html)
