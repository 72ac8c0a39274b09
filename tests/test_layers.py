"""The rooms of the house and who may use whom: read from the source, so that a forgotten import is found too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxsparse

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("fxsparse", "passes") for p in (ROOT / folder).rglob("*.py"))
OPTIONAL = {"matplotlib", "mtkahypar", "onnx", "onnxruntime", "pymetis", "sklearn", "tensorrt", "torchvision"}
OPTIONAL |= {"onnxscript"}
OUTSIDE = {"models", "passes", "tests", "tools"}  # not in the wheel, or not under this name

# Each room may use itself and those of the lines above.
ORDER = (
    ("errors", "machine"), ("ir",), ("readers",), ("rules",), ("analysis",), ("kernels", "verify"), ("formats",),
    ("passes",), ("deploy",), ("backend",), ("measure",), ("picture",), ("report",), ("package",),
    ("contest", "explain", "module"), ("arguments", "doubts", "loading"), ("compiler",), ("dynamo", "export"),
    ("fxsparse",), ("progress",), ("demo",), ("cli",), ("__main__",),
)  # fmt: skip
MAY_USE = {room: {below for line in ORDER[:i] for below in line} for i, line in enumerate(ORDER) for room in line}
MAY_USE["picture"] = set()
MAY_USE["report"] = {"errors", "ir", "picture"}
REPORT = {"report_html", "report_style", "report_text"}  # files of the room "report"
ASIDE = {"coarsen", "prune", "train"}
MAY_USE |= {room: {"errors", "ir", "rules", "formats"} | ASIDE for room in ASIDE}
for room in ("fxsparse", "demo", "cli"):
    MAY_USE[room] |= ASIDE


def room_of(module: str) -> str:
    """`fxsparse.ir.masks` is in `ir`; what is imported from `fxsparse` itself is the room on top of the compiler."""
    first = [*module.split("."), ""][1]
    return "report" if first in REPORT else first if first in MAY_USE else "fxsparse"


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Each imported module, `a.b.c` for `from a.b import c`, and whether that is done inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def violations(module: str, source: str) -> list[str]:
    room = room_of(module)
    found = []
    for name, inside in imports(ast.parse(source)):
        package = name.split(".")[0]
        if package == "fxsparse" and room_of(name) not in MAY_USE[room] | {room}:
            found.append(f"{module} imports {name}: {room} may not use {room_of(name)}")
        if package in OUTSIDE:
            found.append(f"{module} imports {name}, which the wheel does not hold under that name")
        if package in OPTIONAL and not inside:
            found.append(f"{module} imports {name} outside a function, though it is optional")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fxsparse", *parts) if parts[0] == "passes" else parts
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way_and_optional_packages_stay_optional(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("fxsparse.ir.graph", "from fxsparse.rules import registry", "ir may not use rules"),
        ("fxsparse.ir.graph", "import fxsparse", "ir may not use fxsparse"),
        ("fxsparse.ir.graph", "from fxsparse import Masks", "ir may not use fxsparse"),
        ("fxsparse.report_html", "def f():\n  from fxsparse import verify", "report may not use verify"),
        ("fxsparse.verify", "import fxsparse.measure", "verify may not use measure"),
        ("fxsparse.train.imp", "from fxsparse.passes import fold_constants", "train may not use passes"),
        ("fxsparse.passes.fold_constants", "import passes.shrink_channels", "passes.shrink_channels, which the wheel"),
        ("fxsparse.cli", "try:\n  import sklearn\nexcept ImportError: ...", "sklearn outside a function"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, complaint: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert complaint in found[0]


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {module_name(p).removeprefix("fxsparse").strip(".").split(".")[0] or "fxsparse" for p in FILES}
    assert rooms - REPORT <= MAY_USE.keys()


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def test_the_passes_refuse_to_load_under_their_short_name() -> None:
    assert "ImportError" in python("import passes")
    assert python("import fxsparse.passes") == ""


def test_importing_fxsparse_loads_no_compiler_and_no_optional_package() -> None:
    heavy = {"torch._inductor", "rich", *OPTIONAL}
    heavy |= {"fxsparse.coarsen", "fxsparse.prune", "fxsparse.train"}
    assert python(f"import sys, fxsparse; print({heavy} & sys.modules.keys())") == "set()\n"


def test_the_parts_that_make_masks_are_there_when_they_are_named() -> None:
    said = python("import fxsparse; print(fxsparse.coarsen.refill, fxsparse.prune.prunable, fxsparse.train.imp)")
    assert said.count("<function ") == 3
    assert "AttributeError: module 'fxsparse' has no attribute 'tarin'" in python("import fxsparse; fxsparse.tarin")


def test_dir_is_what_is_public() -> None:
    public = {*fxsparse.__all__, "coarsen", "prune", "train", "__version__"}
    assert dir(fxsparse) == sorted(public)
    assert all(hasattr(fxsparse, name) for name in public)
