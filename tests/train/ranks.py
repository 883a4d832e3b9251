"""A process of several, started by torchrun: runs the stages of a JSON file, one after another.

Each job has a stage's keys, and may have `stop`: after this step one process, the last, is interrupted; or `error`: one
process, the last, finds a loss that isn't finite, and all must end with an error of their own.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from m1.errors import UserError
from m1.options import build
from m1.recipe import STAGES
from m1.train.stage_trainer import StageTrainer, not_finite
from m1.train.trainer import _InterruptCallback

IS_LAST = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1


def run(job):
    keys = {key: value for key, value in job.items() if key not in ("stage", "stop", "error")}
    stage, stop = build(STAGES[job["stage"]], keys, "job"), job.get("stop")

    def interrupted(self, args, state, control, plain=_InterruptCallback.on_step_end, **kwargs):
        self.requested = self.requested or (state.global_step == stop and IS_LAST)
        return plain(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_InterruptCallback, "on_step_end", interrupted)
        if job.get("error"):
            if IS_LAST:
                patch.setattr(StageTrainer, "_not_finite", lambda self: not_finite(0, "the loss is nan"))
            with pytest.raises(UserError, match="the loss is nan" if IS_LAST else "another process"):
                stage.run(resume=True)
        elif stop is not None:
            with pytest.raises(KeyboardInterrupt):
                stage.run(resume=True)
        else:
            stage.run(resume=True)


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == sys.argv[2]
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
