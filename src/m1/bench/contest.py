"""Makes the rows of a benchmark: checks the result of every contender, then times all of them in turns."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m1.bench.options import KernelOptions, Options
from m1.bench.roofline import Limits, interleaved, measure_limits
from m1.machine import describe_machine

# The largest relative error allowed. The order of summation may differ, and peers compute some sums in bfloat16.
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}

Results = Mapping[str, Tensor]  # by name; those with an expected value are compared
Call = Callable[[], Results]


class Work(NamedTuple):
    """The minimum work of one layer, from which a row's bandwidth and arithmetic rate follow.

    Attributes:
        bytes: inputs, outputs and states, each read or written once.
        flops: arithmetic operations; a multiply-add counts as two.
        tokens: tokens that the layer processes.
        layers: number of layers that one call visits.
    """

    bytes: int
    flops: int
    tokens: int
    layers: int = 1


class Contender(NamedTuple):
    """One implementation that takes part in a benchmark. It is timed only if its results are correct.

    Attributes:
        name: its name in the table.
        run: the call to time.
        work: the minimum work of the call.
        expected: the correct results.
        check: the call whose results are compared with `expected`. None: `run`.
        capturable: time `run` on a GPU as a CUDA graph, without launch costs, as a decode loop runs it.
    """

    name: str
    run: Call
    work: Work
    expected: Results
    check: Call | None = None
    capturable: bool = False


def begin(options: Options) -> tuple[Limits, dict[str, Any]]:
    """Measures the machine's limits. Returns them with the head of the result."""
    device = torch.device(options.device)
    limits = measure_limits(device, options.torch_dtype)
    return limits, {
        "benchmark": options.name,
        "options": asdict(options),
        "machine": describe_machine(device),
        "limits": {"copy_bytes_per_second": limits.copy, "gemm_flops_per_second": limits.gemm},
    }


def contest(contenders: Sequence[Contender], limits: Limits, options: KernelOptions) -> list[dict[str, Any]]:
    """Checks and times the contenders. Returns one row per contender, with figures per layer.

    A row has `failure`, and no figures, if its contender raised an exception or gave wrong results.
    """
    device, tolerance = torch.device(options.device), TOLERANCES[options.dtype]
    rows, racing = [], []
    for contender in contenders:
        row: dict[str, Any] = {"name": contender.name}
        rows.append(row)
        try:
            error = relative_error((contender.check or contender.run)(), contender.expected)
            run = captured(contender.run) if contender.capturable and device.type == "cuda" else contender.run
            if error <= tolerance:
                row["error"] = error
                racing.append((row, contender.work, run))
            else:
                row["failure"] = f"wrong numbers: relative error {error:.1e}, allowed {tolerance:.0e}"
        except Exception as failure:  # a peer may raise anything; the other rows must still be measured
            row["failure"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    times = interleaved([run for *_, run in racing], options.repeats, device)
    for (row, work, _), seconds in zip(racing, times, strict=True):
        row |= figures([second / work.layers for second in seconds], work, limits)
    ours = next((row["microseconds_per_token"] for row, *_ in racing if row["name"] == options.own), None)
    for row, *_ in racing if ours else []:
        row["ratio_to_ours"] = row["microseconds_per_token"] / ours
    return rows


def relative_error(actual: Results, expected: Results) -> float:
    """RMS of the difference, divided by RMS of the expected values; the largest over the results in both mappings.

    NaN if any result contains one.
    """
    errors = []
    for name in actual.keys() & expected.keys():
        wanted = expected[name].float()
        errors.append((actual[name].float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    return torch.stack(errors).max().item()


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Captures the call as a CUDA graph. Returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def figures(seconds: Sequence[float], work: Work, limits: Limits) -> dict[str, Any]:
    """The figures of a row. `seconds` has one time per call, for one layer."""
    median = statistics.median(seconds)
    return {
        "tokens": work.tokens,
        "runs": len(seconds),
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "microseconds_per_token": 1e6 * median / work.tokens,
        "gigabytes_per_second": work.bytes / median / 1e9,
        "share_of_copy": work.bytes / median / limits.copy,
        "gigaflops_per_second": work.flops / median / 1e9,
        "share_of_gemm": work.flops / median / limits.gemm,
    }


def nbytes(*tensors: Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)
