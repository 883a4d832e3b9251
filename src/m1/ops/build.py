"""Compiles the C++ kernels on first use into the user's cache and loads them with ctypes.

The sources include no PyTorch header, so a build takes seconds and needs no matching ABI. The instruction set is the
one that torch chose at run time; ATEN_CPU_CAPABILITY=avx2 or =default lowers it. Each instruction set has its own file
in the cache. The OpenMP runtime is found by soname. It is the one that torch has already loaded, so both share one
thread pool.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"]
ARCHITECTURES = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # by torch's name for the instruction set


def cache_dir() -> Path:
    """Folder of the compiled kernels: `$M1_CACHE`, else `m1` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m1"
    return Path(os.environ.get("M1_CACHE", default))


def flags() -> list[str]:
    """The compiler's options for this processor, followed by those in `$M1_CXXFLAGS` (for example, a sanitizer)."""
    capability = torch.backends.cpu.get_cpu_capability()
    march = [f"-march={ARCHITECTURES[capability]}"] if capability in ARCHITECTURES else []
    return [*FLAGS, *march, *shlex.split(os.environ.get("M1_CXXFLAGS", ""))]


@functools.cache
def load_cpu_kernels() -> ctypes.CDLL | None:
    """The compiled kernels of `cpu/*.cpp`. None, with one warning, if they can't be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn("no C++ compiler (g++ or clang++) found: M1 runs slow pure-PyTorch kernels", stacklevel=2)
        return None
    sources = sorted(SOURCES.glob("*.cpp"))
    texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    key = "\0".join([*texts, compiler, platform.machine(), *flags()])
    library = cache_dir() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            _compile(compiler, sources, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"compiling the CPU kernels failed, M1 runs slow pure-PyTorch kernels: {detail}", stacklevel=2)
        return None


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    """Builds a temporary file and renames it. A lock keeps concurrent processes from compiling twice."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return
        print(f"compiling M1's CPU kernels (first use only) into {library.parent} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [compiler, *flags(), *map(str, sources), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)


def call(name: str, *arguments: Tensor | int | None) -> int:
    """Calls a kernel with one struct of 8-byte fields: data pointers of tensors, null for None, int64 for integers."""
    fields = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
    return getattr(load_cpu_kernels(), name)((ctypes.c_int64 * len(fields))(*fields))
