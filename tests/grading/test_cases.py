r"""Answers that were graded wrongly once, from the suites and reports of other graders: cases.jsonl.

A row is {"id", "gold", "output", "expected"}. With "bare", the output is an answer and not a text, if no answer is
found in it. With "policy", the verdict here is the opposite of "expected", for the reason that docs/grading.md gives.
"""

from pathlib import Path

import pytest

from m1.grading import Grader, extract_answer
from m1.jsonl import read_jsonl

CASES = list(read_jsonl(Path(__file__).with_name("cases.jsonl")))
POLICIES = (Path(__file__).parents[2] / "docs/grading.md").read_text(encoding="utf-8").split("## Policies")[1]


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(grader, case):
    gold = extract_answer(case["gold"]) or case["gold"]
    answer = extract_answer(case["output"]) or (case["output"] if case.get("bare") else None)
    verdict = answer is not None and grader.equal(gold, answer)
    assert verdict is (case["expected"] ^ ("policy" in case))
    assert "policy" not in case or f"**{case['policy']}**" in POLICIES.lower()
    assert answer is None or grader.equal(answer, gold) is verdict  # the relation is symmetric
