"""RL learns: minutes of GRPO from a half-trained pocket model raise its reward."""

import dataclasses
import statistics
from pathlib import Path

import pytest
from test_stages import metrics

from m1.recipe import Stage, load_stage

POCKET = Path(__file__).parents[2] / "recipes" / "pocket"


def pocket_stage(name: str, data: dict, trainer: dict, **changes: object) -> Stage:
    """A stage of the pocket recipe with other data and arguments."""
    stage = load_stage(POCKET / f"{name}.toml")
    data = dataclasses.replace(stage.data, max_steps=4, **data)
    return dataclasses.replace(stage, data=data, trainer=stage.trainer | trainer, **changes)


@pytest.mark.long
def test_grpo_raises_the_reward(tmp_path):
    """A teacher that learned from traces of which every fourth step is wrong, on chains of 2 to 4 steps."""
    teacher, out = tmp_path / "teacher", tmp_path / "grpo"
    pocket_stage("teacher", {"slip_rate": 0.25}, {"max_steps": 300}, out=str(teacher)).run()
    pocket_stage("grpo", {}, {"max_steps": 40}, model=str(teacher), out=str(out)).run()
    rewards = [row["reward"] for row in metrics(out) if "reward" in row]
    assert statistics.mean(rewards[-5:]) >= statistics.mean(rewards[:5]) + 0.15
