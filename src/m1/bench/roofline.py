"""Measures the machine's limits, and times calls.

A kernel can't be faster than the memory moves its bytes, nor than the processor does its arithmetic. Both rates are
measured in the same run as the kernels, with a copy and a large matrix product.
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
LARGEST_BUFFER = 2**30  # bytes; enough for one process, even if the caches of all sockets are larger together
MIN_ROUNDS = 3  # every run takes part in this many rounds, however slow it is
ROW_SECONDS = 20.0  # a run takes part in more rounds until its calls have taken this long
PRODUCT_SECONDS = 0.1  # a matrix product of this length hides the overhead of its call
LARGEST_PRODUCT = 16384


class Limits(NamedTuple):
    """The measured limits of a machine, which a benchmark's rows are compared with.

    Attributes:
        copy: bytes per second of a copy; bytes read and bytes written both count.
        gemm: arithmetic operations per second of a matrix product; a multiply-add counts as two.
    """

    copy: float
    gemm: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures this machine. The matrix product is the faster one of `dtype` and float32.

    Processors without bfloat16 instructions are faster in float32.
    """
    return Limits(copy_rate(device), max(gemm_rate(device, kind) for kind in {dtype, torch.float32}))


def copy_rate(device: torch.device) -> float:
    """Bytes per second: the best of several copies between two buffers that exceed the caches."""
    source = torch.ones(beyond_caches(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(6)]
    return 2 * source.nbytes / min(seconds[1:])


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of square matrix products. Their size doubles until one takes PRODUCT_SECONDS."""
    best, size, seconds = 0.0, 512, 0.0
    while seconds < PRODUCT_SECONDS and size <= LARGEST_PRODUCT:
        # With constants a GPU would draw less power and be faster.
        a = torch.randn(size, size, dtype=dtype, device=device)
        product = torch.empty_like(a)
        seconds = min(timed(partial(torch.matmul, a, a, out=product), device) for _ in range(3))
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


def beyond_caches(device: torch.device) -> int:
    """Bytes of a working set that must come from memory each time it is read."""
    return min(CACHES * processor_cache_bytes(device), LARGEST_BUFFER)


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


def interleaved(runs: Sequence[Callable[[], Any]], rounds: int, device: torch.device) -> list[list[float]]:
    """Times several runs in turns, after one warm-up call each. A disturbance then affects all of them.

    A slow run takes part in fewer rounds: at least MIN_ROUNDS, then more until it has used ROW_SECONDS. If its warm-up
    call took longer than ROW_SECONDS, that call's time is its only one.

    Returns:
        For each run, the seconds of each of its calls.
    """
    warmups = [timed(run, device) for run in runs]
    seconds = [[warmup] if warmup > ROW_SECONDS else [] for warmup in warmups]
    for turn in range(rounds):
        for run, warmup, taken in zip(runs, warmups, seconds, strict=True):
            if warmup <= ROW_SECONDS and (turn < MIN_ROUNDS or sum(taken) < ROW_SECONDS):
                taken.append(timed(run, device))
    return seconds


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
