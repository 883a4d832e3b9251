"""What a grader counts and refuses, and its verdicts on labelled answers. Workers that misbehave: test_process.py."""

import json
import os
import random
from pathlib import Path

import pytest

from m1.errors import UserError
from m1.grading import Grader
from m1.grading.process import GradingProcess
from m1.grading.spelling import MAX_ANSWER_CHARACTERS


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def test_a_raised_error_is_counted_and_costs_one_answer():
    with Grader() as grader:
        assert not grader.equal(r"\frac{1}{0}", r"\frac{1}{2}")
        assert grader.equal(r"\frac{\sqrt{16}}{2}", "2")
        assert not grader.equal(r"\frac{1}{0}", r"2")  # not asked again
        assert grader.counts == {"graded": 2, "timeout": 0, "crash": 0, "error": 1}


def test_bad_input_says_so():
    with pytest.raises(UserError, match="list of texts"):
        Grader().grade("7", "7")
    with pytest.raises(UserError, match="workers=0"):
        Grader(workers=0)
    with pytest.raises(UserError, match="timeout=0"):
        Grader(timeout=0)


def test_long_answers_are_not_sent_to_the_worker(monkeypatch):
    monkeypatch.setattr(GradingProcess, "__init__", lambda self: pytest.fail("a worker was started"))
    assert not Grader().equal("7", "x" * (MAX_ANSWER_CHARACTERS + 1))
    assert not Grader().equal("x" * (MAX_ANSWER_CHARACTERS + 1), "7")
    assert Grader().partition(["7", "x" * 2000, "7", "x" * 2000]) == [0, 1, 0, 1]


DATA = Path(os.environ.get("M1_DATA", "no-such-folder"))


@pytest.mark.skipif(not DATA.exists(), reason="no benchmark files: set M1_DATA to their folder")
def test_gold_answers_equal_themselves_in_a_box(grader):
    golds = [json.loads(line)["answer"] for line in (DATA / "math500.jsonl").read_text().splitlines()]
    texts = [rf"therefore \boxed{{{gold}}}" for gold in golds]
    assert all(grader.grade_texts(texts, [[gold] for gold in golds]))


@pytest.mark.skipif(not DATA.exists(), reason="no benchmark files: set M1_DATA to their folder")
def test_different_golds_differ(grader):
    """2,480 pairs of different golds, shuffled."""
    golds = [json.loads(line)["answer"] for line in (DATA / "math500.jsonl").read_text().splitlines()]
    pairs = [pair for seed in range(5) for pair in zip(golds, random.Random(seed).sample(golds, 500), strict=True)]
    different = [(gold, other) for gold, other in pairs if gold != other]
    assert len(different) == 2480 and not any(grader.equal(*pair) for pair in different)


@pytest.mark.skipif(not DATA.exists(), reason="no labelled answers: set M1_DATA to their folder")
@pytest.mark.parametrize(("file", "missed"), [("graded_outputs", 0), ("reasoning_samples", 2)])
def test_labelled_answers(grader, file, missed):
    """No wrong answer is called right; docs/grading.md explains the two that are missed."""
    rows = [json.loads(line) for line in (DATA / f"{file}.jsonl").read_text().splitlines()]
    verdicts = grader.grade_texts([row["response"] for row in rows], [[row["answer"]] for row in rows])
    wrong = [(row["id"], verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict != row["correct"]]
    assert not any(verdict for _, verdict in wrong) and len(wrong) == missed, wrong
