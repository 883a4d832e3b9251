"""What the commands give on tiny models is what golden.json says they gave before.

Texts, tokens, votes, answers, grades and the reasons why samples ended are compared exactly; log-probabilities, losses
and other measured numbers to 1e-4, since another processor rounds otherwise. Where behaviour is meant to change, record
again with `python tests/golden/record.py --small tests/golden/golden.json`, and say in the commit what has changed.
"""

import json
from pathlib import Path

import pytest
from record import leaves, record, trajectories

HERE = Path(__file__).parent
GOLDEN = dict(leaves(json.loads((HERE / "golden.json").read_text())))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return dict(leaves(json.loads(json.dumps(record(tmp_path_factory.mktemp("golden"), small=True)))))


def split(values):
    """Those that must be equal, and those that are rounded."""
    exact = {path: value for path, value in values.items() if not isinstance(value, float)}
    return exact, {path: value for path, value in values.items() if path not in exact}


def test_texts_tokens_votes_and_grades_are_as_before(recorded):
    assert split(recorded)[0] == split(GOLDEN)[0]


def test_log_probabilities_and_losses_are_as_before(recorded):
    assert split(recorded)[1] == pytest.approx(split(GOLDEN)[1], rel=1e-4, abs=1e-4)


@pytest.mark.long
def test_twenty_steps_of_every_stage_and_mixer_are_as_before(tmp_path):
    """Recorded by `python tests/golden/record.py --trajectories tests/golden/trajectories.json`."""
    expected = json.loads((HERE / "trajectories.json").read_text())
    found = trajectories(tmp_path)
    assert found.keys() == expected.keys()
    for name, steps in expected.items():
        assert len(steps) == 20 and found[name] == [pytest.approx(step, rel=1e-3, abs=1e-3) for step in steps], name
