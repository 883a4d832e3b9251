"""benchmarks/first_steps.py on a tiny model: every stage of the paper's recipe runs, and its numbers are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "first_steps.py"


@pytest.mark.long
def test_every_stage_runs(tmp_path):
    rows = [{"problem": f"{i} + 1?", "solution": f"It is \\boxed{{{i + 1}}}.", "answer": str(i + 1)} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = "--device cpu --shape tiny --layers 4 --longest 128 --steps 2 --global-batch 8 --data rows.jsonl --out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "M1_DATA": str(tmp_path)}
    out = tmp_path / "first-steps.json"
    subprocess.run([sys.executable, SCRIPT, *sizes.split(), out], check=True, env=environment, timeout=300)
    stages = json.loads(out.read_text())["stages"]
    assert list(stages) == ["distill", "math", "reasoning", "grpo"]
    assert all(len(stage["losses"]) == 2 and stage["tokens_per_second"] > 0 for stage in stages.values())
    assert 0 <= stages["grpo"]["k3"] < 0.015
    planned = [stages[name]["planned_gib"] for name in stages]
    assert planned[0] > planned[1] == planned[2] and all(stage["memory_gib"] > 0 for stage in stages.values())
