"""RL learns: GRPO raises the reward of a half-trained pocket model."""

import dataclasses
import json
import random
import statistics
from pathlib import Path

import pytest
from test_stages import metrics

from m1.data_options import Data
from m1.recipe import Stage, load_stage
from m1.tasks.chain import solve_chain

POCKET = Path(__file__).parents[2] / "recipes" / "pocket"
UNCHANGED = [("+", 0), ("-", 0), ("*", 1)]  # steps that a model learns in a minute
SLIP_RATE = 0.2  # after 2 to 4 steps half of the answers are wrong


def write_problems(path: Path, count: int) -> None:
    """Chains of steps that change nothing. Every fifth worked step is wrong, the answer never."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            steps = rng.choices(UNCHANGED, k=rng.randint(2, 4))
            slips = [rng.randrange(1, 10) if rng.random() < SLIP_RATE else 0 for _ in steps]
            chain = solve_chain(rng.randrange(10), steps, slips=slips)
            file.write(json.dumps(dataclasses.asdict(chain)) + "\n")


def pocket_stage(name: str, data: Path, steps: int, **changes: object) -> Stage:
    """A stage of the pocket recipe on other data, with fewer steps."""
    stage = load_stage(POCKET / f"{name}.toml")
    trainer = stage.trainer | {"max_steps": steps, "save_strategy": "no", "warmup_steps": steps // 5}
    return dataclasses.replace(stage, data=Data(path=str(data)), trainer=trainer, **changes)


@pytest.mark.long
def test_grpo_raises_the_reward(tmp_path):
    """The teacher has seen right and wrong steps, so about half of its answers are right. GRPO rewards these."""
    data, teacher, out = tmp_path / "chains.jsonl", tmp_path / "teacher", tmp_path / "grpo"
    write_problems(data, 6400)
    pocket_stage("teacher", data, 400, out=str(teacher)).run()
    pocket_stage("grpo", data, 20, model=str(teacher), out=str(out)).run()
    rewards = [row["reward"] for row in metrics(out) if "reward" in row]
    assert statistics.mean(rewards[-3:]) >= statistics.mean(rewards[:3]) + 0.15
