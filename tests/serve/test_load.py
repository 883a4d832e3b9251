"""Many clients at once: some leave, some read slowly, some vote. Nobody hangs, and every slot is free afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
KEY, TIMEOUT = "sk-of-the-tests", 60


@pytest.mark.long
def test_a_crowd(serve):
    """The clients are a process of their own, as real ones: they don't take turns with the engine's thread."""
    server = serve([KEY], max_waiting=64, timeout=float(TIMEOUT))
    command = [sys.executable, LOAD, "--url", f"{server.url}/v1", "--model", "small", "--clients", "200", "--mixed"]
    command += ["--minutes", "1", "--prompt-tokens", "40", "--max-tokens", "60", "--vocabulary", "256"]
    command += ["--patience", str(3 * TIMEOUT)]  # a request that has taken all its time is answered, too
    environment = os.environ | {"OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 5 * TIMEOUT)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = json.loads(run.stdout)["counts"]
    assert min(counts[came] for came in ("whole", "refused", "left")) > 100, counts
    assert server.idle() and server.loop.engine.free_slots == 8 and server.loop.room == 8 + 64
