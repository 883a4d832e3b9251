"""What this machine has for M1, what M1 will use of it, and what is missing."""

import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from m1.machine import cpu_name, free_host_memory
from m1.ops.backend import default_device
from m1.ops.build import cache_dir, compiler, flags, load_cpu_kernels

PACKAGE = "m1-reasoning"
SHOWN = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify", "gguf")
INSTRUCTIONS = {"AVX512": "AVX-512", "AVX2": "AVX2", "DEFAULT": "neither AVX2 nor AVX-512"}  # by torch's name
FEW_BYTES = 2 * 2**30  # with less free memory a model of 135 million parameters may not load


@dataclass(frozen=True)
class Missing:
    """Something that isn't here.

    Attributes:
        what: its name.
        cost: what you can't do, or what is slow, without it.
        remedy: a command or a setting that brings it.
    """

    what: str
    cost: str
    remedy: str


@dataclass
class Examination:
    """The result of `examine`.

    Attributes:
        machine: name and description of what the machine has.
        used: what M1 will use, and how.
        software: versions and caches.
        missing: what isn't here.
    """

    machine: dict[str, str] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)


def examine() -> Examination:
    """Looks at this machine. Compiles the CPU kernels if that hasn't been done yet; reads no model, asks no network."""
    kernels, failure = _cpu_kernels()
    free, size = free_host_memory(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {_instructions()}",
        "memory": f"{_gib(free)} free of {_gib(size)}",
        "GPU": "; ".join(_gpus()) or "none",
        "compiler": _compiler_version(),
    }
    used = {
        "device": default_device(),
        "CPU kernels": kernels,
        "int8, int4": _quantization(failure),
        "GPU kernels": _gpu_kernels(),
    }
    software = {
        "M1": f"{_version(PACKAGE)}, from {_tilde(Path(__file__).parent)}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in SHOWN),
        "kernels' cache": _folder(cache_dir() / "kernels"),
        "models' cache": _folder(Path(constants.HF_HUB_CACHE)),
        "Hub": ("offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT)
        + (", with a token" if get_token() else ", without a token: public models only"),
    }
    return Examination(machine, used, software, [*_missing(failure, free), *_wrong_versions()])


def _cpu_kernels() -> tuple[str, str | None]:
    """What runs on a CPU, and why the compiled kernels don't, if so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = load_cpu_kernels()
    if built is not None:
        return f"C++, compiled for this processor ({Path(built._name).name})", None
    return "PyTorch, slow", str(caught[-1].message) if caught else "no compiled kernels"


def _instructions() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    products = [name for flag, name in (("bf16", "bfloat16"), ("vnni", "byte")) if f"-mavx512{flag}" in flags()]
    return INSTRUCTIONS.get(capability, capability) + (f" with {' and '.join(products)} products" if products else "")


def _quantization(failure: str | None) -> str:
    if failure:
        return "weights are rounded and multiplied as float32"
    if "-mavx512vnni" in flags():
        return "rows are rounded to bytes, products are of bytes (VNNI)"
    return "weights are 8 or 4 bits in memory, products are float32"


def _gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        free, size = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{_gib(free)} free of {_gib(size)}, CUDA {torch.version.cuda}"
        )


def _gpu_kernels() -> str:
    if not torch.cuda.is_available():
        return "none: no GPU"
    version = _version("triton")
    return f"Triton {version}, decode steps as CUDA graphs" if version else "PyTorch, slow"


def _compiler_version() -> str:
    command = compiler()
    if command is None:
        return "none"
    try:
        done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=10)
        return done.stdout.partition("\n")[0] or command
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a quote is open
        return f"{command}: {error}"


def _missing(failure: str | None, free: int) -> Iterator[Missing]:
    if compiler() is None:
        yield Missing("a C++ compiler", "CPU kernels are slow PyTorch", "apt install g++ (or set $CXX)")
    elif failure:
        yield Missing("compiled CPU kernels", failure, "set $CXX to g++ 11 or newer, or $M1_CACHE to a folder of yours")
    if torch.cuda.is_available():
        if not _version("triton"):
            yield Missing("Triton", "GPU kernels are slow PyTorch", f"pip install '{PACKAGE}[gpu]'")
    elif shutil.which("nvidia-smi"):
        yield Missing(
            "torch with CUDA",
            f"torch {torch.__version__} doesn't see the GPU",
            "pip install torch --index-url https://download.pytorch.org/whl/cu130, or a newer driver",
        )
    if not all(map(_version, ("fastapi", "uvicorn", "prometheus_client"))):
        yield Missing("a web server", "`m1 serve` doesn't start", f"pip install '{PACKAGE}[serve]'")
    if free < FEW_BYTES:
        yield Missing("memory", f"only {_gib(free)} are free", "end other programs, or raise the container's limit")


def _wrong_versions() -> Iterator[Missing]:
    """Installed packages outside the ranges that this version of M1 was tested with."""
    for line in metadata.requires(PACKAGE) or [] if _version(PACKAGE) else []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if not found or not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Missing(wanted, f"{found or 'nothing'} is installed", f"pip install '{wanted}'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _folder(folder: Path) -> str:
    """A folder, what its files take, and how much room is left."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()] if folder.exists() else []
    present = next(path for path in (folder, *folder.parents) if path.exists())
    size, free = sum(path.stat().st_size for path in files), shutil.disk_usage(present).free
    return f"{_tilde(folder)}, {size / 2**20:,.0f} MiB, {_gib(free)} free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _tilde(path: Path) -> str:
    """A path without the user's name: an issue is public."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
