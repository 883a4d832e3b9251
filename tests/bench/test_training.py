"""benchmarks/training.py on a tiny model: every kind of row, and a file that names what wasn't run."""

import json
import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/training.py"))


def test_rows_are_measured_or_listed(tmp_path):
    out = tmp_path / "training.json"
    small = [
        "--shapes",
        "tiny",
        "--lengths",
        "64",
        "--tokens",
        "128",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    BENCHMARK["main"]([*small, "--tasks", "sft", "--models", "trl", "trl-padded"])
    BENCHMARK["main"]([*small, "--tasks", "distill", "--models", "hybrid"])
    rows = json.loads(out.read_text())["rows"]  # the first run's are kept
    measured = {name: row for name, row in rows.items() if "not_run" not in row}
    assert set(measured) == {
        "sft trl tiny 64",
        "sft trl-padded tiny 64",
        "distill hybrid tiny 64",
    }  # the first run's row is kept
    assert all(row["tokens_per_second"] > 0 and 32 <= row["tokens_per_step"] <= 128 for row in measured.values())
    assert rows["sft hybrid smollm2-135m 32768"] == {"not_run": "not asked for"}


def test_operations(hybrid):
    """Two of four layers attend, with 4 heads of 32: 2 products of 2 x 128 operations a pair and layer."""
    weights = sum(p.numel() for p in hybrid.parameters())
    assert BENCHMARK["operations"](hybrid, 10, 50.0, 3) == pytest.approx(3 * (2 * weights * 10 + 2 * 4 * 128 * 50))
