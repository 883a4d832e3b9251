"""Compiles the C++ kernels on first use into the user's cache and loads them with ctypes.

The sources include no PyTorch header, so a build takes seconds and needs no matching ABI. The instruction set is the
one that torch chose at run time; ATEN_CPU_CAPABILITY=avx2 or =default lowers it. Each instruction set has its own file
in the cache, with its hash beside it: a damaged one is built again. The OpenMP runtime is found by soname. It is the
one that torch has already loaded, so both share one thread pool.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"]
ARCHITECTURES = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # by torch's name for the instruction set
PRODUCTS = {  # of bfloat16 and of bytes, which not every processor with AVX-512 has
    "-mavx512bf16": torch.cpu._is_avx512_bf16_supported,
    "-mavx512vnni": torch.cpu._is_vnni_supported,
}


def cache_dir() -> Path:
    """M1's cache folder: `$M1_CACHE`, else `m1` in the user's cache folder, else one in the folder of temporary files.

    Empty and relative settings are ignored, as the XDG specification says: a working folder isn't a cache.
    """
    for variable, name in (("M1_CACHE", ""), ("XDG_CACHE_HOME", "m1")):
        folder = Path(os.environ.get(variable, ""))
        if folder.is_absolute():
            return folder / name
    with suppress(RuntimeError):  # no $HOME, and a user without an entry in passwd, as in containers
        return Path.home() / ".cache" / "m1"
    return Path(tempfile.gettempdir(), f"m1-{os.getuid()}")


def flags() -> list[str]:
    """The compiler's options for this processor, followed by those in `$M1_CXXFLAGS` (for example, a sanitizer)."""
    capability = torch.backends.cpu.get_cpu_capability()
    march = [f"-march={ARCHITECTURES[capability]}"] if capability in ARCHITECTURES else []
    if capability == "AVX512":
        march += [flag for flag, supported in PRODUCTS.items() if supported()]
    return [*FLAGS, *march, *shlex.split(os.environ.get("M1_CXXFLAGS", ""))]


def compiler() -> str | None:
    """The C++ compiler's command: `$CXX`, else g++ or clang++ on the path. None if there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def load_cpu_kernels() -> ctypes.CDLL | None:
    """The compiled kernels of `cpu/*.cpp`. None, with one warning, if they can't be compiled."""
    found = compiler()
    if found is None:
        warnings.warn("no C++ compiler (g++ or clang++) found: M1 runs slow pure-PyTorch kernels", stacklevel=2)
        return None
    try:
        command = [*shlex.split(found), *flags()]
        texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
        key = hashlib.sha256("\0".join([*texts, platform.machine(), *command]).encode()).hexdigest()
        folder = private_folder(cache_dir() / "kernels")
        library = folder / f"{key[:16]}.so"
        if not _is_sound(library):
            _compile(command, library)
        return ctypes.CDLL(str(library))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"compiling the CPU kernels failed, M1 runs slow pure-PyTorch kernels: {detail}", stacklevel=2)
        return None


def private_folder(folder: Path) -> Path:
    """Makes a folder that only this user can read or write. What is loaded as code comes from there.

    Raises:
        OSError: it can't be made, is a link, or belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} isn't this user's own folder: set $M1_CACHE to another one")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def _is_sound(library: Path) -> bool:
    """Whether the library is this user's own file, and has the hash that was written when it was built."""
    try:
        with library.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            own = os.fstat(file.fileno()).st_uid == os.getuid()
        return own and _hash_file(library).read_bytes() == digest.encode()
    except OSError:
        return False


def _hash_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _compile(command: list[str], library: Path) -> None:
    """Builds a temporary file and renames it. A lock keeps concurrent processes from compiling twice."""
    with open(library.with_name(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_sound(library):
            return
        for left in library.parent.glob("tmp*"):  # by a process that was killed while it compiled
            shutil.rmtree(left, ignore_errors=True)
        print(f"compiling M1's CPU kernels (first use only) into {library.parent} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="tmp", dir=library.parent) as folder:
            built = Path(folder) / library.name
            sources = map(str, sorted(SOURCES.glob("*.cpp")))
            subprocess.run([*command, *sources, "-o", str(built)], check=True, capture_output=True, text=True)
            with built.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            _hash_file(built).write_text(digest)
            built.replace(library)
            _hash_file(built).replace(_hash_file(library))
