"""benchmarks/scaling.py with one and two processes on CPUs: every row, and losses that agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.mark.long
def test_rows_are_measured_and_compared(tmp_path):
    out = tmp_path / "scaling.json"
    sizes = [
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--length",
        "64",
        "--global-batch",
        "4",
        "--rows",
        "1",
        "--steps",
        "1",
        "--processes",
        "1",
        "2",
        "--out",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, *sizes, out], check=True, env=environment, timeout=300)
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["1 replicated", "2 replicated", "2 sharded"]
    assert [row["passes_per_step"] for row in rows.values()] == [4, 2, 2]
    assert len({row["tokens_per_step"] for row in rows.values()}) == 1
    assert all(row["speedup"] > 0 and row["loss_difference"] < 1e-4 < row["at"] for row in [*rows.values()][1:])
