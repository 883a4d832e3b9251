"""Chain problems: right answers, and training and held-out problems that can't overlap."""

import re

import pytest

from m1.errors import UserError
from m1.tasks.chain import ChainSizes, chain_problems, solve_chain


def test_by_hand():
    problem = solve_chain(7, [("+", 5), ("*", 3), ("-", 4)])
    assert problem.problem == "7+5*3-4 mod 10"
    assert problem.solution == "7+5=2\n2*3=6\n6-4=2\n\\boxed{2}"
    assert problem.answer == "2"


def test_repetition_by_hand():
    problem = solve_chain(7, [("+", 5), ("*", 3)], total=5)
    assert problem.problem == "7+5*3 mod 10, 5 steps"
    assert problem.solution == "5:7+5=2\n4:2*3=6\n3:6+5=1\n2:1*3=3\n1:3+5=8\n\\boxed{8}"
    assert problem.answer == "8"


def test_a_slip_in_a_repetition():
    problem = solve_chain(7, [("+", 5), ("*", 3)], 4, slips=[0, 0, 4, 0])
    assert problem.solution == "4:7+5=2\n3:2*3=6\n2:6+5=5\n1:5*3=5\n\\boxed{5}"
    assert problem.answer == "3"


def test_a_slip_is_carried_on_and_the_answer_stays_true():
    problem = solve_chain(7, [("+", 5), ("*", 3), ("-", 4)], slips=[0, 2, 0])
    assert problem.solution == "7+5=2\n2*3=8\n8-4=4\n\\boxed{4}"
    assert problem.answer == "2"


def test_slip_rate_is_the_share_of_wrong_steps():
    problems = chain_problems(500, ChainSizes(min_steps=4, max_steps=8), "train", 0, slip_rate=0.1)
    wrong = total = 0
    for p in problems:
        for line in p.solution.split("\n")[:-1]:
            left, right = line.split("=")
            wrong, total = wrong + (eval(left) % 10 != int(right)), total + 1
    assert abs(wrong / total - 0.1) < 0.02


def test_answers_against_an_independent_evaluation():
    for p in chain_problems(200, ChainSizes(min_steps=1, max_steps=9), "train", 0):
        digits = re.findall(r"\d", p.problem.removesuffix(" mod 10"))
        expression = "(" * (len(digits) - 1) + re.sub(r"([+*-]\d)", r"\1)", p.problem.removesuffix(" mod 10"))
        assert str(eval(expression) % 10) == p.answer


def test_splits_are_disjoint_and_without_duplicates():
    train = {
        p.problem
        for seed in range(3)
        for p in chain_problems(2000, ChainSizes(min_steps=1, max_steps=3), "train", seed)
    }
    test = [p.problem for p in chain_problems(200, ChainSizes(min_steps=1, max_steps=3), "test", 0)]
    assert not train & set(test)
    assert len(set(test)) == 200


def test_a_chain_is_of_one_split_for_however_many_steps():
    sizes = ChainSizes(min_steps=3, max_steps=9, period=2)
    problems = [p.problem for p in chain_problems(300, sizes, "test", 0)]
    trained = {p.problem for p in chain_problems(3000, ChainSizes(min_steps=2, max_steps=2), "train", 0)}
    assert {int(p.split(", ")[1].removesuffix(" steps")) for p in problems} == set(range(3, 10))
    assert not trained & {p.split(", ")[0] for p in problems}


def test_a_period_bounds_the_chain_and_no_step_stands_twice_in_it():
    for p in chain_problems(200, ChainSizes(min_steps=20, max_steps=30, period=8), "train", 0):
        steps = re.findall(r"[+*-]\d", p.problem.split(" mod")[0])
        assert 2 <= len(steps) <= 8 and len(set(steps)) == len(steps)
        assert 20 <= len(p.solution.split("\n")) - 1 <= 30


@pytest.mark.parametrize("sizes", [{"min_steps": 0}, {"min_steps": 3, "max_steps": 2}, {"period": 1}, {"period": 31}])
def test_impossible_sizes(sizes):
    with pytest.raises(UserError, match=next(reversed(sizes))):
        ChainSizes(**sizes)


def test_more_problems_than_there_are():
    with pytest.raises(UserError, match="of 1000 different test problems"):
        chain_problems(1000, ChainSizes(min_steps=1, max_steps=1), "test", 0)
