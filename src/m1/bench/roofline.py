"""The machine's limits and the clock.

A kernel takes no less time than moving its bytes at the memory's rate, nor than its arithmetic at the processor's. Both
rates are measured in the same run as the kernels, by code that comes near them: a copy and a large matrix product.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

CACHES = 4  # a working set of this many last-level caches comes from memory
LARGEST_BUFFER = 2**30  # where the caches of all sockets together are larger than one process needs to defeat
MIN_ROUNDS = 3  # that a slow run takes part in
ROW_SECONDS = 20.0  # that the calls of one run may take together, beyond those
PRODUCT_SECONDS = 0.1  # a matrix product this long hides what surrounds it
LARGEST_PRODUCT = 16384


class Limits(NamedTuple):
    """Bytes a second of a copy, read and written ones counted; operations a second of a matrix product."""

    copy: float
    gemm: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """What this machine can do now. Processors without bfloat16 multiply faster in float32: the better rate counts."""
    return Limits(copy_rate(device), max(gemm_rate(device, kind) for kind in {dtype, torch.float32}))


def copy_rate(device: torch.device) -> float:
    """Bytes a second, the best of several copies between two buffers that don't fit into the caches."""
    source = torch.ones(beyond_caches(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(6)]
    return 2 * source.nbytes / min(seconds[1:])


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of square matrix products, whose size grows until one takes PRODUCT_SECONDS."""
    best, size, seconds = 0.0, 512, 0.0
    while seconds < PRODUCT_SECONDS and size <= LARGEST_PRODUCT:
        a = torch.randn(size, size, dtype=dtype, device=device)  # with constants a GPU draws less power and is faster
        product = torch.empty_like(a)
        seconds = min(timed(partial(torch.matmul, a, a, out=product), device) for _ in range(3))
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


def beyond_caches(device: torch.device) -> int:
    """Bytes of a working set that comes from memory each time it is read in turn."""
    return min(CACHES * processor_cache_bytes(device), LARGEST_BUFFER)


def processor_cache_bytes(device: torch.device) -> int:
    """All last-level caches together; 32 MiB where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, cores, size = ((cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        sizes[int(level), cores] = int(size.rstrip("K")) * 1024
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or 32 * 2**20


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    # Filling a large buffer empties the caches, and keeps the GPU busy until the call's first kernels are queued.
    torch.empty(LARGEST_BUFFER, dtype=torch.uint8, device=device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def interleaved(runs: Sequence[Callable[[], Any]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each call of each run, taken in turns, so that a disturbance hits all alike; after a warm-up call.

    A run that is slow takes part in fewer rounds: MIN_ROUNDS, and then until it has used ROW_SECONDS. Where the warm-up
    alone took so long, its time is the only one.
    """
    warmups = [timed(run, device) for run in runs]
    seconds = [[warmup] if warmup > ROW_SECONDS else [] for warmup in warmups]
    for turn in range(rounds):
        for run, warmup, taken in zip(runs, warmups, seconds, strict=True):
            if warmup <= ROW_SECONDS and (turn < MIN_ROUNDS or sum(taken) < ROW_SECONDS):
                taken.append(timed(run, device))
    return seconds


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
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
    """The processor's name as Linux gives it; elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
