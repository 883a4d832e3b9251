"""Measures the machine's limits, and times calls.

A kernel can't be faster than the memory moves its bytes, nor than the processor does its arithmetic. Both rates are
measured in the same run as the kernels, with a copy and a large matrix product.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from m1.machine import LARGEST_BUFFER, gemm_rate, processor_cache_bytes, timed

CACHES = 4  # a working set of this many last-level caches comes from memory
MIN_ROUNDS = 3  # every run takes part in this many rounds, however slow it is
ROW_SECONDS = 20.0  # a run takes part in more rounds until its calls have taken this long


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


def beyond_caches(device: torch.device) -> int:
    """Bytes of a working set that must come from memory each time it is read."""
    return min(CACHES * processor_cache_bytes(device), LARGEST_BUFFER)


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
