r"""Which answers are equal, by rules and by a real worker."""

import pytest

from m1.grading import Grader


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("7", "7", True),
        ("7", "07", True),
        ("7", "8", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        (r"1\frac{4}{5}", "1.8", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x=5", "5", True),
        ("x=5", "y=5", False),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}", False),
        (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", True),
        # Spelling
        ("10{,}000", "10000", True),
        (r"10,\!000", r"\$10,000", True),
        ("0,111", "111", False),
        ("5.", "5", True),
        (r"\(5\)", "5", True),
        (r"\begin{pmatrix} 1 \\[8pt] 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        # Numbers are compared by their digits, not by six decimals.
        ("7e37", r"7 \times 10^{37}", True),
        ("1e-5", "0.00001", True),
        ("0.0000672", "0.0000674", False),
        ("0.0055", "0.0054999", False),
        (r"\frac{67}{1000000}", "0.0000672", False),
        (r"10^{-20}", r"10^{-21}", False),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.333", False),
        # Lists need all their parts, as often as they stand there.
        ("3, 5, 7", r"7, 3 \text{ and } 5", True),
        ("3, 5, 7", "3, 5", False),
        ("3, 5, 7", "357", False),
        ("-2,-2", "-2", False),
        ("16,3,1,1", "16,3,1", False),
        ("(1,2)", "(2,1)", False),
        ("(0,1)", "[0,1]", False),
        ("1,2", "1.2", False),
        # Words, clocks, units, bases
        (r"\text{east}", "East", True),
        (r"\text{east}", r"\text{seat}", False),
        (r"\text{east}", "seat", False),
        (r"\text{(C)}", "C", True),
        (r"\text{(C)}", "D", False),
        (r"\text{4:30 p.m.}", r"4:30 \text{ p.m.}", True),
        (r"\text{4:30 p.m.}", "4:30", True),
        (r"\text{4:30 p.m.}", r"4:30 \text{ a.m.}", False),
        (r"\text{4:30 p.m.}", "5:30", False),
        ("3", r"3 \text{ hours}", True),
        ("3", r"3 \text{ hours } 20 \text{ minutes}", False),
        (r"90^\circ", "90", True),
        (r"50\%", "50", True),
        ("52_8", "52_{8}", True),
        ("52_8", "52_9", False),
        # Relations and intervals, either way round
        ("[-2,7]", r"-2 \le x \le 7", True),
        (r"-2 \le x \le 7", "[-2,7]", True),
        (r"(2,\infty)", "x > 3", False),
        # Hostile
        ("7", "", False),
        ("", "", False),
        ("7", r"\text{no idea}", False),
        ("7", "7" * 100_000, False),
        ("7" * 100_000, r"\frac12", False),
        ("7", "\x00", False),
        ("7", "\ud800", False),
        ("7", "{{{{", False),
        ("7", "}}}}", False),
        ("7", r"\frac{1}{" * 200 + "2" + "}" * 200, False),
        ("7", "\u202e\u0627\u0644\u062c\u0648\u0627\u0628 8", False),
    ],
)
def test_equal(grader, gold, answer, equal):
    assert grader.equal(gold, answer) is equal
