"""Measures the peak memory of a call: its results and its intermediate tensors."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")  # Linux only; a new process would inherit its parent's ru_maxrss


def peak_growth(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which the call raises peak memory. None if the system doesn't report it.

    On a CPU the whole process is measured, which should be a fresh one: see `in_fresh_process`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not STATUS.exists():
        return None
    before = _kibibytes("VmRSS")
    run()
    return 1024 * (_kibibytes("VmHWM") - before)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function in a process that has only imported the function's module. Returns its result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _kibibytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found, f"{STATUS} has no {field}"
    return int(found[1])
