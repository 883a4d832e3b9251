"""The clock's turns, the comparison before it, and the memory a call takes."""

import math
from pathlib import Path

import pytest
import torch

from m1.bench import roofline
from m1.bench.contest import relative_error
from m1.bench.memory import in_fresh_process, peak_growth

CPU = torch.device("cpu")


def test_runs_take_turns_and_slow_ones_fewer(monkeypatch):
    """Three runs of 1, 8 and 30 seconds, seven rounds: the second stops when its calls have taken 20 seconds, the
    third's warm-up is its only call."""
    calls = []

    def timed(run, device):
        calls.append(run)
        return {"a": 1.0, "b": 8.0, "c": 30.0}[run]

    monkeypatch.setattr(roofline, "timed", timed)
    seconds = roofline.interleaved(["a", "b", "c"], 7, CPU)
    assert [len(taken) for taken in seconds] == [7, 3, 1] and seconds[2] == [30.0]
    assert "".join(calls) == "abc" + "ababab" + "aaaa"


def test_relative_error_by_hand():
    expected = {"y": torch.tensor([3.0, 4.0]), "dA": torch.tensor([2.0]), "dB": torch.tensor([1.0])}
    assert relative_error({"y": torch.tensor([3.0, 4.5]), "more": torch.ones(7)}, expected) == pytest.approx(0.1)
    assert relative_error({"y": torch.tensor([3.0, 4.5]), "dA": torch.tensor([1.0])}, expected) == pytest.approx(0.5)
    assert math.isnan(relative_error({"y": torch.tensor([3.0, 4.0]), "dA": torch.tensor([torch.nan])}, expected))


def test_limits_are_rates_of_something_done():
    limits = roofline.measure_limits(CPU, torch.float32)
    assert 1e8 < limits.copy < 1e14 and 1e8 < limits.gemm < 1e17


def growth_of_a_temporary():
    """Of 64 MiB, beside a result of 1 MiB."""
    return peak_growth(lambda: torch.ones(2**24)[: 2**18].clone(), CPU)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured on Linux only")
def test_peak_memory_counts_what_is_freed_again():
    ballast = torch.ones(2**26)  # of this process: what a new one would inherit if ru_maxrss were asked
    assert 64 * 2**20 <= in_fresh_process(growth_of_a_temporary) < 80 * 2**20
    assert ballast[-1] == 1
