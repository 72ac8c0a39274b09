"""AOTInductor: a graph compiled into a library with its weights, in torch's own package, a .pt2."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from fxsparse.backend.inductor import failing_as, options, with_memory
from fxsparse.backend.target import COMPILING
from fxsparse.errors import InputError, PackageError, TargetError
from fxsparse.ir.files import as_path, replacing
from fxsparse.ir.graph import clone, is_ours, on_gpu
from fxsparse.ir.inputs import Call, exported

_INSTEAD = "A graph for one batch size needs dynamic_batch=False; module.save(path) compiles nothing."


def check_suffix(path: str | os.PathLike[str], where: str) -> None:
    """Raise InputError unless `path` is named as AOTInductor demands. `where` is the user's word for it."""
    if as_path(path, where).suffix != ".pt2":
        raise InputError(where, expected="a name that ends in .pt2, as AOTInductor demands", got=repr(os.fspath(path)),
                         do="Name it model.pt2, say.")  # fmt: skip


def compile_aoti(
    gm: fx.GraphModule,
    call: Call,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Compile `gm` into the package `path`, whole or not at all. An OSError passes through.

    Raises TargetError for operators of ours on a GPU, whose kernels Python calls, and for what AOTInductor refuses.

    dynamic_batch  for any size of dimension 0, and not only the one of `call`
    """
    import torch._inductor

    if on_gpu(gm) and (ours := next((n for n in gm.graph.nodes if is_ours(n)), None)):
        raise TargetError("AOTInductor package for a GPU", expected="operators that run without Python",
                          got=f"{ours.target}, whose kernel is called from it",
                          do="Compile with formats='dense' for it, or use module.save(path).")  # fmt: skip
    # compiled in a folder of its own: the archive's folder gets the file's name
    with torch.no_grad(), replacing(path) as name, tempfile.TemporaryDirectory() as folder:
        configs = {**options(gm), "aot_inductor.metadata": metadata or {}}
        made = str(Path(folder) / "model.pt2")
        with COMPILING, failing_as("AOTInductor package", _INSTEAD):
            program = exported(with_memory(clone(gm)), call, dynamic_batch=dynamic_batch)
            torch._inductor.aoti_compile_and_package(program, package_path=made, inductor_configs=configs)
        shutil.copyfile(made, name)


def load_native(code: bytes, folder: Path) -> Callable[..., Sequence[Tensor]]:
    """Run what `compile_aoti` made of a flat graph: machine code of the file runs here. Raises PackageError."""
    path = folder / "model.pt2"
    path.write_bytes(code)
    try:
        # what torch._inductor.aoti_load_package calls, without the seconds that importing Inductor takes
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except (RuntimeError, OSError) as error:
        got = (str(error).splitlines() or [""])[0][:200]
        raise PackageError("native code of a package", expected="a library this system can load", got=got,
                           do="Load the package without native=True.") from None  # fmt: skip
    return lambda *inputs: loader.boxed_run([x for x in inputs if isinstance(x, Tensor)])


def machine(device: torch.device) -> dict[str, str]:
    """What native code depends on: it is made for exactly this processor."""
    here = {
        "torch": torch.__version__, "machine": platform.machine(), "system": platform.system(),
        "vectors": torch.backends.cpu.get_cpu_capability(), "processor": _flags(),
    }  # fmt: skip
    if device.type == "cuda":
        here["gpu"] = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    return here


def _flags() -> str:
    """The processor's features as Linux lists them; its name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(("flags", "Features"))), "")
