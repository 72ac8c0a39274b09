"""Compiling our own C++: once per source, compiler and instruction set, kept in a folder, loaded with ctypes.

The library's name is a hash of everything it depends on, so nothing is ever out of date; it is written under a
temporary name and renamed, so processes that build at once do not disturb each other. One that cannot be loaded
(cut short by a full disk, say) is built again.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fxsparse.errors import TargetError
from fxsparse.ir.files import replacing

log = logging.getLogger("fxsparse")

_COMMON = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")
_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma")
_ISA = {
    "AVX512_BF16": (*_AVX512, "-mavx512bf16"),
    "AVX512": _AVX512,
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
_SOURCES = Path(__file__).parent / "cpu"


def instruction_set() -> str:
    """What this processor has of what the kernels are written for: "AVX512_BF16", "AVX512", "AVX2" or "DEFAULT"."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        return "AVX512_BF16"
    return capability if capability in _ISA else "DEFAULT"


def compilers() -> list[str]:
    """Commands of C++ compilers to look for: $CXX alone, or g++ and clang++."""
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]


def compiler() -> str | None:
    """The first of `compilers` that is there; None when there is none."""
    return next((c for c in compilers() if shutil.which(shlex.split(c)[0])), None)


def cache_folder() -> Path:
    """Where compiled kernels lie: $FXSPARSE_CACHE_DIR, or fxsparse/ in the user's cache folder."""
    if chosen := os.environ.get("FXSPARSE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxsparse"


@functools.cache
def digest(name: str) -> str:
    """A hash of what `load` gives, source and compiler, for keys of what was measured with it."""
    return _key(_SOURCES / f"{name}.cpp", [*_compiler_or_raise(name), *_flags()])[:12]


def _text(source: Path) -> bytes:
    """The source and every header beside it, whether it includes them or not."""
    return b"\0".join(path.read_bytes() for path in [source, *sorted(source.parent.glob("*.h"))])


@functools.cache
def load(name: str, isa: str | None = None) -> ctypes.CDLL:
    """The library made of `cpu/<name>.cpp`, built at the first use. Raises TargetError when it cannot be built."""
    return _load(name, _flags(isa))


def _flags(isa: str | None = None) -> list[str]:
    return [*_COMMON, *_ISA[isa or instruction_set()]]


@functools.cache
def load_operators(name: str) -> ctypes.CDLL:
    """The same for a file that registers operators through torch's stable C++ interface, linked to this torch."""
    version = f"-DFXSPARSE_TORCH={torch.__version__}"  # another torch is another library
    return _load(name, ["-O2", "-std=c++20", "-shared", "-fPIC", version, *_torch_flags()])


def register_operator(name: str, kernels: Sequence[str]) -> None:
    """Give the operator in `cpu/<name>_torch.cpp` its kernels, those of `cpu/<name>.cpp`, in its order."""
    library = load(name)
    load_operators(f"{name}_torch").fxsparse_use_kernels(*(library[kernel] for kernel in kernels))


@functools.cache
def function(library: str, name: str, arguments: int, isa: str | None = None) -> Callable[..., None]:
    """`name` in the library made of `cpu/<library>.cpp`; its arguments are pointers, it returns nothing."""
    found: Any = getattr(load(library, isa), name)
    found.argtypes = [ctypes.c_void_p] * arguments
    found.restype = None
    return cast("Callable[..., None]", found)


@functools.lru_cache(maxsize=4096)
def int64s(numbers: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """They as C lays them out, one after the other: a `Problem`."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _torch_flags() -> list[str]:
    folder = Path(torch.__file__).parent
    return [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-Wl,--no-as-needed",
            "-ltorch_cpu"]  # fmt: skip


def build_operators(path: str | os.PathLike[str]) -> None:
    """One library with all operators and their kernels, for programs that run without Python; see docs/aotinductor.md.

    It is for this processor and this torch. Raises TargetError when it cannot be built.
    """
    command = [*_compiler_or_raise("operators"), *_flags(), "-std=c++20", *_torch_flags()]
    sources = [str(source) for source in sorted(_SOURCES.glob("*.cpp"))]
    _build([*sources, "-DFXSPARSE_STANDALONE"], command, Path(path))


def _load(name: str, flags: list[str]) -> ctypes.CDLL:
    source = _SOURCES / f"{name}.cpp"
    command = [*_compiler_or_raise(name), *flags]
    file = f"{name}-{_key(source, command)}.so"
    try:
        return _found_or_built(source, command, cache_folder() / file)
    except (OSError, RuntimeError) as error:  # no folder to write to, or no home
        log.warning("kernels are built for this process alone (%s): FXSPARSE_CACHE_DIR names a folder for them", error)
        return _found_or_built(source, command, _own_folder() / file)


@functools.cache
def _own_folder() -> Path:
    """Removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="fxsparse-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _found_or_built(source: Path, command: list[str], path: Path) -> ctypes.CDLL:
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            log.warning("%s cannot be loaded; it is built again", path)
    _build([str(source)], command, path)
    return ctypes.CDLL(str(path))


def _compiler_or_raise(name: str) -> list[str]:
    command = compiler()
    if command is None:
        raise TargetError(f"kernel {name!r}", expected="a C++ compiler (g++ or clang++) on PATH", got="none",
                          do="Install one (Debian: apt-get install g++) or set CXX.")  # fmt: skip
    return shlex.split(command)


def _key(source: Path, command: list[str]) -> str:
    parts = [_text(source), repr(command).encode(), _version(command[0]).encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout


def _build(sources: list[str], command: list[str], path: Path) -> None:
    what = Path(sources[0]).name
    log.info("compile %s (once, some seconds)", what)
    with replacing(path) as name:
        command = [*command, *sources, "-o"]
        done = subprocess.run([*command, str(name)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise TargetError(f"kernel {what}", expected="a C++17 compiler with OpenMP", got=lines[0][:300],
                              do=f"Try it by hand: {shlex.join([*command, '/dev/null'])}")  # fmt: skip
