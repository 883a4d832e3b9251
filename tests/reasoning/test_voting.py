"""Invariant 8's first half: votes don't depend on the samples' order; early stopping never changes the winner."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from m1.grading import Grader
from m1.reasoning.voting import Vote, cluster, vote

ANSWERS = st.sampled_from(["1", "01", "2", "3", None])
WEIGHTS = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.0]) | st.floats(0, 1)
SAMPLES = st.lists(st.tuples(ANSWERS, WEIGHTS), max_size=12)
PARTITION = Grader().partition  # these answers are all read without a worker


def weighed(samples):
    return vote([answer for answer, _ in samples], PARTITION, [weight for _, weight in samples])


@given(SAMPLES, st.randoms())
@example([("1", 0.1), ("1", 0.2), ("1", 0.3), ("2", 0.6)], None)  # (0.3 + 0.2) + 0.1 != (0.1 + 0.2) + 0.3 in floats
def test_order_does_not_matter(samples, rng):
    shuffled = samples.copy()
    rng.shuffle(shuffled) if rng else shuffled.reverse()
    assert list(weighed(samples).weights.items()) == list(weighed(shuffled).weights.items())
    answers = [answer for answer, _ in samples]
    assert vote(answers, PARTITION) == vote([answer for answer, _ in shuffled], PARTITION)


@given(SAMPLES, SAMPLES)
@example([("2", 0.7), ("1", 0.6)], [("1", 0.1)])
@example([("2", 1.0), ("2", 1.0), ("1", 1.0)], [("1", 1.0)])
@example([("2", 0.3), ("1", 0.1), ("1", 0.2)], [])  # 0.1 + 0.2 rounds to more than 0.3
def test_decided_is_final(seen, rest):
    early = weighed(seen)
    if early.decided(remaining=len(rest)):
        assert weighed(seen + rest).answer == early.answer


@given(SAMPLES, st.floats(0.5, 100), st.integers(0, 4))
def test_decided_is_as_eager_as_it_can_be(seen, bound, remaining):
    """Where it isn't decided, weight on the runner-up, or on a new answer, comes within rounding of the leader."""
    early = weighed(seen)
    if not early.decided(remaining, bound):
        first, second = [*early.weights.values(), 0.0, 0.0][:2]
        assert second + remaining * bound >= first * (1 - 1e-8) - 1e-8 * remaining * bound


def test_by_hand():
    seven = Vote({"7": 3, "2": 2}, {"7": 3.0, "2": 2.0}, abstained=1)
    assert vote(["2", "7", None, "07", "2", "7"], PARTITION) == seven
    assert vote(["9", "12", "9", "12"], PARTITION).answer == "9"  # a tie goes to the shorter answer
    assert vote([None], PARTITION).answer is None
    assert Vote({"7": 3, "2": 1}, {"7": 3.0, "2": 1.0}).decided(1)
    assert not Vote({"7": 3, "2": 1}, {"7": 3.0, "2": 1.0}).decided(2)
    assert not Vote({}, {}).decided(0)


def test_weight_beats_number():
    heavy = vote(["1", "1", "2", None], PARTITION, [0.2, 0.3, 0.75, 0.9])
    assert list(heavy.weights.items()) == [("2", 0.75), ("1", 0.5)]
    assert (heavy.counts, heavy.abstained) == ({"2": 1, "1": 2}, 1)


def test_decided_needs_a_lead_larger_than_the_bound_allows():
    lead = Vote({"1": 2, "2": 1}, {"1": 5.0, "2": 1.0})
    assert lead.decided(1, bound=3.9) and not lead.decided(1, bound=4.0) and not lead.decided(2, bound=3.9)


def tail(a, b, steps=20_000):
    """P(share > 1/2) under Beta(a+1, b+1), by the midpoint rule."""
    points = [(k + 0.5) / steps for k in range(steps)]
    mass = [x**a * (1 - x) ** b for x in points]
    return math.fsum(mass[steps // 2 :]) / math.fsum(mass)


@pytest.mark.parametrize("a, b", [(0, 0), (1, 0), (3, 0), (4, 0), (5, 2), (3, 3), (2, 6), (40, 31)])
def test_confidence_is_the_beta_posteriors_tail(a, b):
    counts = {"1": a, "2": b}
    assert Vote(counts, counts).confidence() == pytest.approx(tail(a, b), abs=1e-6)


def test_confidence_by_hand():
    assert Vote({"1": 3}, {"1": 3.0}).confidence() == 15 / 16
    assert Vote({"1": 4}, {"1": 4.0}).confidence() == 31 / 32
    assert Vote({"1": 2000, "2": 1000}, {"1": 2000.0, "2": 1000.0}).confidence() > 0.999  # no overflow
    # the leader by weight has fewer votes than its strongest rival, which is not the next by weight
    assert Vote({"1": 2, "2": 1, "3": 4}, {"1": 1.9, "2": 0.9, "3": 0.4}).confidence() == pytest.approx(tail(2, 4))


def test_clusters_ignore_order():
    samples = ["0.5", "3", r"\frac{1}{2}", None, "3", "1/2", "4"]
    with Grader() as grader:
        clusters = cluster(samples, grader.partition)
        assert sorted(map(sorted, clusters.values())) == [[0, 2, 5], [1, 4], [6]]
        assert set(cluster(samples[::-1], grader.partition)) == set(clusters)


def test_a_cluster_is_named_by_its_heaviest_spelling():
    answers = [r"50\%", "50", "50.0", r"50\%", "7", None]
    assert cluster(answers, PARTITION) == {r"50\%": [0, 3, 1, 2], "7": [4]}
    assert list(cluster(answers, PARTITION, [0.1, 0.1, 0.3, 0.1, 0.0, 0.0])) == ["50.0", "7"]
    # a tie goes to the shorter spelling, 50 before 50.0, then to the alphabetically first, 1/2 before 0.50
    assert list(cluster(["50.0", "50"], PARTITION)) == ["50"]
    assert list(cluster(["100/1", "1e2", "100.0"], PARTITION)) == ["100.0"]
    assert list(cluster(["5", "5/1", "10/2", "10/2"], PARTITION)) == ["10/2"]  # neither shortest nor first


def test_a_vote_is_as_right_as_its_members():
    with Grader() as grader:
        winner = vote([r"50\%"] * 3 + ["50"], grader.partition)
        assert winner.counts == {r"50\%": 4} and grader.grade(winner.answer, ["0.5"])
        winner = vote([r"50\%"] + ["50"] * 3, grader.partition)
        assert winner.counts == {"50": 4} and not grader.grade(winner.answer, ["0.5"])


def test_morning_is_not_evening():
    times = ["4:30", r"4:30 \text{ p.m.}", r"4:30 \text{ p.m.}"] + [r"4:30 \text{ a.m.}"] * 3
    assert vote(times, PARTITION).counts == {times[3]: 3, times[1]: 2, "4:30": 1}


def test_a_late_answer_may_divide_a_class_that_had_decided():
    """5 is 5 km until 5 m comes. `Budget` says so of its rule "decided"."""
    seen = ["5"] * 2 + [r"5 \text{ km}"] * 3 + ["7"] * 3
    early, late = vote(seen, PARTITION), vote([*seen, r"5 \text{ m}"], PARTITION)
    assert early.counts == {r"5 \text{ km}": 5, "7": 3} and early.decided(remaining=1)
    assert late.answer == "7" and late.counts == {"7": 3, r"5 \text{ km}": 3, "5": 2, r"5 \text{ m}": 1}
