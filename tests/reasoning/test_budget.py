"""Budgets, timers, and grading on a timer."""

import math
from collections import Counter

import pytest

from m1.errors import UserError
from m1.grading import Grader
from m1.grading.reading import leaf
from m1.reasoning.budget import Budget, Timer, timed
from m1.reasoning.voting import Vote, vote


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "give a number of samples, seconds, or both"),
        ({"n": 0}, "n=0"),
        ({"n": 4, "seconds": 0}, "seconds=0"),
        ({"seconds": -1.5}, "seconds=-1.5"),
        ({"seconds": math.nan}, "seconds=nan"),
        ({"seconds": math.inf}, "seconds=inf"),
        ({"seconds": 1e39}, r"seconds=1e\+39: need a positive number of at most 604800"),
        ({"n": 4, "rule": "sure"}, "'sure' is unknown: choose none, decided, confident"),
    ],
)
def test_impossible_budgets(options, words):
    with pytest.raises(UserError, match=words):
        Budget(**options)


def votes(*counts):
    named = {str(i): count for i, count in enumerate(counts)}
    return Vote(named, {name: float(count) for name, count in named.items()})


@pytest.mark.parametrize(
    "options, counts, finished, bound, reason",
    [
        ({"n": 8, "rule": "none"}, (7, 0), 7, 1.0, None),
        ({"n": 8, "rule": "none"}, (8, 0), 8, 1.0, "all"),
        ({"n": 8}, (8, 0), 8, 1.0, "all"),
        ({"n": 8}, (5, 1), 6, 1.0, "decided"),
        ({"n": 8}, (4, 0), 4, 1.0, None),
        ({"n": 8}, (5, 1), 6, 2.0, None),  # two samples of weight 2 could draw level
        ({"seconds": 9.0}, (99, 0), 99, 1.0, None),  # any number of samples is still missing
        ({"n": 8, "rule": "confident"}, (3, 0), 3, 1.0, None),
        ({"n": 8, "rule": "confident"}, (4, 0), 4, 1.0, "confident"),
        ({"n": 8, "rule": "confident"}, (4, 0), 4, None, "confident"),
        ({"n": 5, "rule": "confident"}, (3, 0), 3, 1.0, "decided"),
        ({"n": 5, "rule": "confident"}, (3, 0), 3, None, None),
        ({"seconds": 9.0, "rule": "confident"}, (4, 0), 9, 1.0, "confident"),
    ],
)
def test_why_stop(options, counts, finished, bound, reason):
    assert Budget(**options).why_stop(votes(*counts), finished, bound) == reason


def test_timer_counts_from_when_it_is_made():
    now = [5.0]
    timer, endless = Timer(2.0, lambda: now[0]), Timer(None, lambda: now[0])
    now[0] = 8.0
    assert (timer.spent(), timer.left(), endless.spent(), endless.left()) == (3.0, -1.0, 3.0, math.inf)


class SlowGrader(Grader):
    """Its worker takes `cost` seconds of the clock an answer, or what is left, and reads the same in all."""

    def __init__(self, now, cost):
        super().__init__(timeout=10.0)
        self.now, self.cost, self.asked = now, cost, Counter()

    def _ask_worker(self, answer, within):
        self.asked[answer] += within > 0
        self.now[0] += max(0.0, min(self.cost, within))
        return [leaf("1")] if self.cost <= within else None


def test_grading_never_overruns():
    now = [0.0]
    slow = SlowGrader(now, cost=2.0)
    partition = timed(slow.partition, Timer(5.0, lambda: now[0]))
    a, b, c, d, e = (rf"\sqrt{{{n}}}" for n in range(2, 7))  # a and b take 2 seconds each, c is cut off after one
    assert vote([a, b, c, d, e], partition).counts == {a: 2, c: 1, d: 1, e: 1}
    assert now == [5.0] and sum(slow.asked.values()) == 3
    assert vote([a, b, c, d, e, d, "12", "012"], partition).counts == {a: 2, "12": 2, d: 2, c: 1, e: 1}
    assert now == [5.0] and sum(slow.asked.values()) == 3  # what was read stays so; nothing more is asked
    assert slow.equal(a, d)  # another problem has the time that was missing here
