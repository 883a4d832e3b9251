"""This machine: what it is, how fast its matrix products are, how long a call takes, which memory and ports it uses."""

import os
import platform
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

MEMINFO, OWN_CGROUPS, CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")  # Linux only; a new process would inherit its parent's ru_maxrss
LARGEST_BUFFER = 2**30  # bytes; enough for one process, even if the caches of all sockets are larger together
PRODUCT_SECONDS = 0.1  # a matrix product of this length hides the overhead of its call
LARGEST_PRODUCT = 16384


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of square matrix products. Their size doubles until one takes PRODUCT_SECONDS."""
    best, size, seconds = 0.0, 512, 0.0
    generator = torch.Generator(device).manual_seed(0)  # torch's own is training's, and how much is drawn takes a clock
    while seconds < PRODUCT_SECONDS and size <= LARGEST_PRODUCT:
        # With constants a GPU would draw less power and be faster.
        a = torch.randn(size, size, dtype=dtype, device=device, generator=generator)
        product = torch.empty_like(a)
        seconds = min(timed(partial(torch.matmul, a, a, out=product), device) for _ in range(3))
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Runs the call once. Returns its seconds."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    # Filling a large buffer clears the caches. It also keeps the GPU busy until the call's first kernels are queued.
    torch.empty(LARGEST_BUFFER, dtype=torch.uint8, device=device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def processor_cache_bytes(device: torch.device) -> int:
    """Bytes of all last-level caches together. 32 MiB if the system doesn't report them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, cores, size = ((cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        sizes[int(level), cores] = int(size.rstrip("K")) * 1024
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or 32 * 2**20


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The properties of the machine that the figures depend on."""
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": processor_cache_bytes(device),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def cpu_name() -> str:
    """The processor's name. On systems other than Linux it may be only the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def process_bytes(field: str) -> int | None:
    """This process's memory: VmRSS, what is resident now, or VmHWM, the most so far. None if the system doesn't say."""
    if not STATUS.exists():
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found, f"{STATUS} has no {field}"
    return 1024 * int(found[1])


def free_host_memory() -> int:
    """Bytes of memory that this process can still use: what the system has, within its cgroups and its ulimit."""
    return max(0, min([_system_memory(), *_cgroup_memory(), *_ulimit_memory()]))


def _system_memory() -> int:
    try:
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_memory() -> Iterator[int]:
    """What each limited cgroup of this process has left, from its own up to the root, in versions 2 and 1."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = ("limit_in_bytes", "usage_in_bytes", "total_") if controllers else ("max", "current", "")
        own = root / path.strip("/")
        for folder in [own, *(parent for parent in own.parents if parent.is_relative_to(root))]:
            with suppress(OSError, ValueError, LookupError):  # no such file, or "max"
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names[:2])
                kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit - used + int(kept[f"{names[2]}inactive_file"])  # files in memory give way


def _ulimit_memory() -> Iterator[int]:
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], process_bytes("VmSize")
    if limit != resource.RLIM_INFINITY and used is not None:
        yield limit - used


def free_port() -> int:
    """A TCP port that no program of this machine uses at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
