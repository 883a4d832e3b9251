"""A process of several, started by torchrun: runs the stages of a JSON file, one after another.

Each job has a stage's keys, and may have `stop`: after this step one process, the last, is interrupted.
"""

import json
import os
import sys
from pathlib import Path

from m1.options import build
from m1.recipe import STAGES
from m1.train import trainer


def run(job):
    job = dict(job)
    stop = job.pop("stop", None)
    on_step_end = trainer._InterruptCallback.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        self.requested = self.requested or (state.global_step == stop and args.process_index == args.world_size - 1)
        return on_step_end(self, args, state, control, **kwargs)

    trainer._InterruptCallback.on_step_end = interrupted
    try:
        build(STAGES[job.pop("stage")], job, "job").run(resume=True)
    except KeyboardInterrupt:
        assert stop is not None
    finally:
        trainer._InterruptCallback.on_step_end = on_step_end


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    assert os.environ["WORLD_SIZE"] == sys.argv[2]
