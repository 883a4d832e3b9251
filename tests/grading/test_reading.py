r"""What an answer is read as, and that classes of equal answers are an equivalence."""

from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m1.grading import Grader
from m1.grading.process import GradingProcess
from m1.grading.reading import NeedsAlgebra, Reading, Unreadable, agree, leaf, partition, read
from m1.grading.spelling import normalize, rewrite

GRADER = Grader()


@pytest.fixture(scope="module", autouse=True)
def close():
    yield
    GRADER.close()


# Spellings of few values, so that many pairs are equal; with units, names, a.m. and decimals that aren't transitive.
ATOMS = st.sampled_from(
    ["5", "5.0", "10/2", r"\frac{10}{2}", r"5 \text{ km}", r"5 \text{ m}", r"5\%", "0.05", "x=5", "y=5", r"\frac13",
     "0.333333", "0.3333333", "1/3", "0.333", "4:30", r"4:30 \text{ p.m.}", r"4:30 \text{ a.m.}", "2/15", "52_8",
     "52_9", "52", "A", r"\text{(A)}", "A: 5", "east", r"\text{East}", "seat", r"\infty", r"\pm 5", "5, -5"]
)  # fmt: skip
TUPLES = st.builds(lambda a, b, c: f"{a}{b},{c}", st.sampled_from("(["), ATOMS, ATOMS).map(lambda s: s + ")")
SETS = st.lists(ATOMS, min_size=1, max_size=3).map(lambda parts: rf"\{{{', '.join(parts)}\}}")
ANSWERS = ATOMS | TUPLES | SETS
HARD = [r"2i\sqrt3", r"2\sqrt{3}i", r"\sqrt{2}", "1.414214", "1.4142136", "x^2-1", "(x-1)(x+1)", r"\sqrt{x^2}", "|x|"]


@given(st.lists(ANSWERS | st.sampled_from(HARD), max_size=8), st.randoms())
@example(["5", r"5 \text{ km}", r"5 \text{ m}"], None)
@example(["1/3", "0.333333", "0.3333333"], None)
@settings(max_examples=300, deadline=None)
def test_classes_are_an_equivalence_of_equal_answers(answers, rng):
    """Answers of one class are equal, pairwise and both ways round, and no order changes the classes."""
    classes = GRADER.partition(answers)
    for i, a in enumerate(answers):
        for j, b in enumerate(answers):
            same = classes[i] == classes[j]
            assert GRADER.equal(a, b) == GRADER.equal(b, a)
            assert GRADER.equal(a, b) or not same
            assert same or normalize(a) != normalize(b)
            assert all(same == (classes[j] == c) for c in classes if classes[i] == c)
    order = list(range(len(answers)))
    rng.shuffle(order) if rng else order.reverse()
    shuffled = GRADER.partition([answers[i] for i in order])
    for k, i in enumerate(order):
        assert [shuffled[k] == s for s in shuffled] == [classes[i] == classes[j] for j in order]


def test_classes_by_hand():
    def groups(*answers):
        classes = GRADER.partition(answers)
        return sorted([answers[i] for i, c in enumerate(classes) if c == group] for group in set(classes))

    assert groups("5", r"5 \text{ km}", "5.0") == [["5", r"5 \text{ km}", "5.0"]]
    assert groups("5", r"5 \text{ km}", r"5 \text{ m}") == [["5"], [r"5 \text{ km}"], [r"5 \text{ m}"]]
    assert groups("50", r"50\%", "0.5") == [["0.5"], ["50", r"50\%"]]
    assert groups("1,2", r"\{2,1\}", "(1,2)") == [["(1,2)"], ["1,2", r"\{2,1\}"]]
    assert groups("4:30", r"4:30 \text{ p.m.}", r"\text{4:30 a.m.}") == [
        ["4:30"],
        [r"4:30 \text{ p.m.}"],
        [r"\text{4:30 a.m.}"],
    ]
    assert groups("x=5", "y=5") == [["x=5"], ["y=5"]]


@given(ANSWERS)
@settings(max_examples=200, deadline=None)
def test_readings_agree_with_themselves(answer):
    assert all(agree(reading, reading) for reading in GRADER._readings(normalize(answer), 1e9))


def test_an_answer_is_read_once(monkeypatch):
    """The number of questions to workers is that of answers, not that of pairs."""
    asked = []
    original = GradingProcess.ask
    monkeypatch.setattr(GradingProcess, "ask", lambda self, *a: asked.append(a[0]) or original(self, *a))
    answers = [rf"\sqrt{{{n}}}" for n in range(2, 12)]
    with Grader() as grader:
        assert len(set(grader.partition(answers * 3))) == 10
        assert not grader.equal(answers[0], answers[1]) and grader.grade(answers[0], [answers[1], answers[0]])
        assert sorted(asked) == sorted(answers) and grader.counts["graded"] == 10


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("7", "7"),
        ("-0.50", "-1/2"),
        (r"2\frac34", "11/4"),
        (r"7 \times 10^{37}", "7" + "0" * 37),
        (r"0.\overline{36}", "4/11"),
        ("(1,2]", ["(]", "1", "2"]),
        (r"\{2,1\}", ["set", "1", "2"]),
        (r"\pm 3", ["set", "-3", "3"]),
        (r"(-\infty,1)\cup[2,3]", ["union", ["()", "-inf", "1"], ["[]", "2", "3"]]),
        (r"\text{East}", "'east"),
        ("p=1,q=2;p=3,q=2", ["set", ["solution", "1", "2"], ["solution", "3", "2"]]),
    ],
)
def test_what_rules_read(answer, value):
    assert read(normalize(answer))[0].value == value


def test_marks():
    assert read(r"5 \text{ km}")[0] == Reading("5", ("km", ""))
    assert read("x = 5 cm")[0] == Reading("5", ("cm", "x"))
    assert read("5 kilometers")[0].marks == read("5 km")[0].marks
    assert read("5 apples")[0].marks == ("", "")
    assert read("5 dollars")[0].marks == ("dollar", "")
    with pytest.raises(NeedsAlgebra):
        read(r"\sqrt{2}")
    with pytest.raises(Unreadable):
        read(r"3 \text{ hours } 20 \text{ minutes}")


def test_an_equal_value_with_other_marks_is_another_class():
    assert partition([leaf("5"), Reading("5", ("km", "")), leaf("6"), leaf("5")]) == [0, 0, 2, 0]
    assert partition([leaf("5"), Reading("5", ("km", "")), Reading("5", ("m", ""))]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("spelling", "rewritten"),
    [
        (r"\frac2\pi", r"\frac{2}{\pi}"),
        (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
        (r"\dfrac12x", r"\frac{1}{2}x"),
        ("{(2,4)}", "(2,4)"),
        ("{{{7}}}", "7"),
        ("{1}+{2}", "{1}+{2}"),
        (r"\left\{ 1 \right\}", r"\{ 1 \}"),
        ("-2*pi", r"-2*\pi"),
        ("2\n\n3", "2, 3"),
        ("We find that $x > 5$.", "x > 5"),
        ("$p=5$ and $q=2$", r"p=5 \land q=2"),
        (r"\sqrt2 \approx 1.41", r"\sqrt{2}"),
        ("the area of ABC is 6", "6"),
    ],
)
def test_rewrite(spelling, rewritten):
    assert rewrite(normalize(spelling)) == rewritten.strip()


@pytest.mark.parametrize(
    "unit",
    ["$ ", "$~", '"\\ ', "(", "{", r"\pm1,", r"(\pm1,", r"\frac{", r"\sqrt", "1,", "a ", r"\text{a}", "\n \n", ";", "=",
     "the ", "is ", r"\approx", "and ", r"\cup", "x=", "1 ", r"\{", ")", "|", r"\quad "],
)  # fmt: skip
def test_the_own_process_reads_hostile_text_in_no_time(unit):
    """A cubic search would take minutes: no worker and no timeout stands between."""
    text = unit * (1000 // len(unit))
    with suppress(Unreadable):
        read(normalize(text), lambda part: [leaf("1")])
    assert len(rewrite(normalize(text))) < 10_000
