r"""Which answers are equal, by rules and by a real worker, both ways round."""

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
        ("5 km", "5 m", False),
        (r"5 \text{ km}", "5 kilometers", True),
        ("12", "12 cm^2", True),
        ("120", "120 km/h", True),
        (r"90^\circ", r"\text{90 degrees}", True),
        ("5", "5 dollars", True),
        (r"50\%", "0.5", True),
        (r"50\%", r"0.5\%", False),
        ("2t", "2", False),
        # Letters in a row, choices
        ("ABC", "ACB", False),
        ("ab", "ba", True),
        ("A", r"\textbf{(A)}\ 5", True),
        ("5", r"\textbf{(A)}\ 5", True),
        ("B", r"\textbf{(A)}\ 5", False),
        ("A", "A: 5", True),
        ("A", r"\text{A.}", True),
        ("p - q", "p-q", True),
        # Complex numbers
        (r"2i\sqrt3", r"2\sqrt3 i", True),
        (r"\frac34 i", r"\frac{3i}4", True),
        (r"e^{i\pi}", "-1", True),
        ("i^2", "-1", True),
        ("2+3i", "2-3i", False),
        (r"\mathrm{i}", "i", True),
        # \pm stands for two values, wherever it is.
        (r"\pm 3", "3, -3", True),
        (r"\pm 3", "3", False),
        (r"\frac{3\pm\sqrt5}2", r"\frac{3+\sqrt5}2, \frac{3-\sqrt5}2", True),
        (r"\{2, 1 \pm i\}", "2, 1+i, 1-i", True),
        (r"(\pm 1, 2)", "(1,2), (-1,2)", True),
        (r"1 \pm 2 \mp 3", "0, 2", True),
        # Fractions, periods, braces
        (r"\frac2\pi", r"\frac{2}{\pi}", True),
        (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}", True),
        (r"\frac\pi2", r"\frac{2}{\pi}", False),
        (r"0.\overline3", r"\frac13", True),
        (r"0.1\overline{6}", r"\frac16", True),
        ("{(2,4)}", "(2,4)", True),
        # Expressions
        (r"\sqrt{x^2}", "|x|", True),
        (r"\sqrt{x^2}", "x", False),
        (r"\frac{1}{\sqrt{n}}", r"\sqrt{1/n}", True),
        (r"\frac{2x}{2}", "x", True),
        ("y=2x+3", "2x-y+3=0", True),
        ("y=2x+3", "2x-y-3=0", False),
        ("7=11a+c", "11a+c", False),
        (r"\frac{10\sqrt{10.5}}{27}", r"\frac{5\sqrt{42}}{27}", True),
        (r"2^{100}", r"2^{100}+1", False),
        # Tuples aren't sets; a bare list may be either
        ("(1,2)", r"\{1,2\}", False),
        ("(1,2)", "1,2", True),
        (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1", False),
        (r"1, 2, \ldots, n", r"1,2,\dots,n", True),
        ("p=5,q=2;p=7,q=3", "p=5,q=3;p=7,q=2", False),
        ("x=1,y=2", "y=2, x=1", True),
        ("x=1,y=2", "x=2,y=1", False),
        (r"\varnothing", r"\emptyset", True),
        (r"\{\}", r"\emptyset", True),
        # Relations and intervals, either way round
        (r"2<x<3", "3>x>2", True),
        (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)", True),
        (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup[2,\infty)", False),
        (r"x>1 \text{ and } x<3", "(1,3)", True),
        (r"x \ne 1", r"\mathbb{R}\setminus\{1\}", True),
        ("x>2", "y>2", False),
        ("x<y", "y>x", True),
        ("x<y", "x>y", False),
        ("f(x)=0", r"\forall x>0, f(x)=0", False),
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
    assert grader.equal(answer, gold) is equal
