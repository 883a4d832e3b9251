"""Compiles the C++ kernels on first use into the user's cache and loads them with ctypes.

The sources include no PyTorch header, so a build takes two seconds and has no ABI to match. The OpenMP runtime is
found by soname and is the one torch has loaded already: one thread pool, not two fighting for the cores.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime the kernels share

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"]


def cache_dir() -> Path:
    """`$M1_CACHE`, else `m1` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m1"
    return Path(os.environ.get("M1_CACHE", default))


def _machine() -> str:
    """What -march=native depends on: a cache on a shared home must not serve one machine's code to another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    keep = {line for line in lines if line.startswith(("flags", "model name", "Features"))}
    return platform.machine() + "".join(sorted(keep))


@functools.cache
def load_cpu_kernels(name: str) -> ctypes.CDLL | None:
    """The compiled library of `cpu/<name>.cpp`; None, with one warning, where it can't be compiled."""
    source = SOURCES / f"{name}.cpp"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn("no C++ compiler (g++ or clang++) found: M1 runs its slow pure-PyTorch scan", stacklevel=2)
        return None
    key = "\0".join([source.read_text(), compiler, *FLAGS, _machine()])
    library = cache_dir() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"compiling {source.name} failed, M1 runs its slow pure-PyTorch scan: {detail}", stacklevel=2)
        return None


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Builds into a temporary file and renames it; a lock lets concurrent first users compile once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [compiler, *FLAGS, str(source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)
