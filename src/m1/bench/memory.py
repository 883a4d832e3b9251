"""Measures the peak memory of a call: its results and its intermediate tensors."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from m1.machine import process_bytes


def peak_growth(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which the call raises peak memory. None if the system doesn't report it.

    On a CPU the whole process is measured, which should be a fresh one: see `in_fresh_process`.
    """
    before: int | None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = process_bytes("VmRSS")
    run()
    peak = process_bytes("VmHWM")
    return None if before is None or peak is None else peak - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function in a process that has only imported the function's module. Returns its result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise MemoryError("the process that measures it was killed") from None
