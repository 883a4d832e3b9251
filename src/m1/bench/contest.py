"""The rows of a benchmark: every contender's result is checked, then all are timed in turns."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m1.bench.options import DTYPES, Options
from m1.bench.roofline import Limits, describe_machine, interleaved, measure_limits

# The largest relative error of a row: sums may be taken in another order, and peers do parts of them in bfloat16.
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}

Results = Mapping[str, Tensor]  # by name; those that are expected are compared
Call = Callable[[], Results]


class Work(NamedTuple):
    """The least that one layer has to do for `tokens` tokens; a call visits `layers` of them.

    `bytes` counts inputs, outputs and states that are read or written once, `flops` a multiply-add as two.
    """

    bytes: int
    flops: int
    tokens: int
    layers: int = 1


class Contender(NamedTuple):
    """A call that does the work. Before it is timed, `check` (when None, its first call) must give what is expected.

    A `capturable` call is timed on a GPU as a CUDA graph, without the cost of launches, as a decode loop runs it.
    """

    name: str
    run: Call
    work: Work
    expected: Results
    check: Call | None = None
    capturable: bool = False


def begin(options: Options) -> tuple[Limits, dict[str, Any]]:
    """The machine's limits, and the head of the result."""
    device = torch.device(options.device)
    limits = measure_limits(device, DTYPES[options.dtype])
    return limits, {
        "benchmark": options.name,
        "options": asdict(options),
        "machine": describe_machine(device),
        "limits": {"copy_bytes_per_second": limits.copy, "gemm_flops_per_second": limits.gemm},
    }


def contest(contenders: Sequence[Contender], limits: Limits, options: Options) -> list[dict[str, Any]]:
    """One row a contender, its figures those of one layer; `failure` instead of them where it fails or is wrong."""
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
        except Exception as failure:  # whatever goes wrong in other people's code, the other rows still count
            row["failure"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    times = interleaved([run for *_, run in racing], options.repeats, device)
    for (row, work, _), seconds in zip(racing, times, strict=True):
        row |= figures([second / work.layers for second in seconds], work, limits)
    ours = next((row["microseconds_per_token"] for row, *_ in racing if row["name"] == options.own), None)
    for row, *_ in racing if ours else []:
        row["ratio_to_ours"] = row["microseconds_per_token"] / ours
    return rows


def relative_error(actual: Results, expected: Results) -> float:
    """RMS of the difference over RMS of what is expected, the largest of the results that both name; NaN if one is."""
    errors = []
    for name in actual.keys() & expected.keys():
        wanted = expected[name].float()
        errors.append((actual[name].float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    return torch.stack(errors).max().item()


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def figures(seconds: Sequence[float], work: Work, limits: Limits) -> dict[str, Any]:
    """What a row tells, from the seconds that each call took for one layer."""
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
    return sum(tensor.nbytes for tensor in tensors)
