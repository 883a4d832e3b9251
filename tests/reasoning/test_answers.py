r"""Extraction, grading in killable workers, clusters."""

import json
import os
import time
from pathlib import Path

import pytest

from m1.reasoning import answers
from m1.reasoning.answers import Grader, extract_answer


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{4} and an open \boxed{5", "4"),
        (r"\boxed{5", None),
        ("7", None),
        ("", None),
        (r"\boxed{" + "{" * 2000, None),
        (r"\boxed{" * 200_000, None),
        (r"\boxed{\boxed{6}}", "6"),
        (r"} \boxed{7}", "7"),
    ],
)
def test_extract(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("7", "7", True),
        ("7", "07", True),
        ("7", "8", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("x^2+2x+1", "(x+1)^2", True),
        ("7", "", False),
        ("7", r"\text{no idea}", False),
        ("7", "7" * 100_000, False),
        ("7", "\x00", False),
    ],
)
def test_equal(grader, gold, answer, equal):
    assert grader.equal(gold, answer) is equal


def test_hang_costs_one_answer(monkeypatch, tmp_path):
    """A worker that never answers the first pair is killed; the next pair gets a new one."""
    flag = tmp_path / "hung"
    script = tmp_path / "worker.py"
    real = Path(answers.__file__).with_name("grading_worker.py")
    script.write_text(
        f"import pathlib, runpy, time\nflag = pathlib.Path({str(flag)!r})\n"
        "if not flag.exists():\n    flag.touch(); print('ready', flush=True); time.sleep(600)\n"
        f"runpy.run_path({str(real)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(Path, "with_name", lambda self, name: script)
    with Grader(timeout=1.0) as grader:
        assert not grader.equal(r"\frac{1}{2}", "0.5")
        assert grader.counts["timeout"] == 1
        grader.timeout = 30.0
        assert grader.equal(r"\frac{1}{4}", "0.25")
        assert grader.counts == {"graded": 2, "timeout": 1, "crash": 0, "error": 0}


def test_tower_of_powers_costs_at_most_its_timeout():
    with Grader(timeout=2.0) as grader:
        started = time.monotonic()
        assert not grader.equal("7", "9^{9^{9^{9}}}")
        assert time.monotonic() - started < 30
        assert grader.equal(r"\frac{1}{4}", "0.25")


def test_worker_that_cannot_start_costs_one_answer(monkeypatch):
    monkeypatch.setattr(answers.sys, "executable", "/bin/false")
    with Grader() as grader:
        assert not grader.equal(r"\frac{1}{2}", "0.5")
        assert grader.counts["crash"] == 1


def test_dead_worker_costs_one_answer(monkeypatch):
    with Grader() as grader:
        assert grader.equal(r"\frac{1}{2}", "0.5")
        grader._idle[0].process.kill()
        grader._idle[0].process.wait()
        assert not grader.equal(r"\frac{1}{3}", "1/3")
        assert grader.counts["crash"] == 1
        assert grader.equal(r"\frac{1}{4}", "0.25")


def test_clusters_ignore_order(grader):
    samples = ["0.5", "3", r"\frac{1}{2}", None, "3", "1/2", "4"]
    clusters = grader.cluster(samples)
    assert sorted(map(sorted, clusters.values())) == [[0, 2, 5], [1, 4], [6]]
    assert set(grader.cluster(samples[::-1])) == set(clusters)


def test_long_answers_are_not_sent_to_the_worker(monkeypatch):
    monkeypatch.setattr(answers._Worker, "__init__", lambda self: pytest.fail("a worker was started"))
    assert not Grader().equal("7", "x" * (answers.MAX_ANSWER_CHARACTERS + 1))


DATA = Path(os.environ.get("M1_DATA", Path(__file__).parents[3] / "shared" / "data"))
CASES = DATA / "math500.jsonl"


@pytest.mark.skipif(not CASES.exists(), reason="no benchmark files: set M1_DATA to their folder")
def test_gold_answers_equal_themselves_in_a_box(grader):
    golds = [json.loads(line)["answer"] for line in CASES.read_text().splitlines()]
    texts = [rf"therefore \boxed{{{gold}}}" for gold in golds]
    assert all(grader.grade_texts(texts, [[gold] for gold in golds]))
