"""Runs grpo stages one after another, under a Python that has vLLM: python vllm_stages.py JOBS.json

Each job has a stage's keys, and may have `kill`: training breaks off after this step. A later job of the same folder
resumes.
"""

import json
import sys
from pathlib import Path

from m1.options import build
from m1.recipe import GRPOStage
from m1.train.trainer import _InterruptCallback


def run(job):
    kill, plain = job.pop("kill", None), _InterruptCallback.on_step_end

    def killed(self, args, state, control, **kwargs):
        if state.global_step == kill:
            raise ZeroDivisionError
        return plain(self, args, state, control, **kwargs)

    _InterruptCallback.on_step_end = killed
    try:
        build(GRPOStage, job, "job").run(resume=True)
    except ZeroDivisionError:
        assert kill is not None
    finally:
        _InterruptCallback.on_step_end = plain


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
