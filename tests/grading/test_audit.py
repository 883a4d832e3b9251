r"""The second opinion: what it calls equal, and that it finds wrong grades."""

import pytest

from m1.errors import UserError
from m1.grading.audit import audit, same


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("7", "7.0", True),
        ("7", "8", False),
        (r"\frac12", "0.5", True),
        (r"1\frac{4}{5}", "1.8", True),
        (r"2\frac{x}{3}", r"\frac{2x}{3}", True),
        (r"\sqrt[3]{8}", "2", True),
        (r"10,\!080", "10080", True),
        ("x=5", "5", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        ("3R^2", "3t^2", False),
        (r"\cot x", r"\frac{1}{\tan x}", True),
        ("1+2i", "2i+1", True),
        ("1,-2", "-2, 1", True),
        ("1,-2", "1", False),
        ("1,1", "1,2", False),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "(1,2]", False),
        (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac12 \\ 2 \end{pmatrix}", True),
        (r"15\mbox{ cm}^2", "15", True),
        (r"90^\circ", "90", True),
        (r"\text{(C)}", "C", True),
        (r"\text{even}", "odd", False),
        ("0.0000672", "0.0000674", False),
        ("7", "9^{9^{9^{9}}}", False),
        ("7", r"\frac{1}{0}", False),
        ("7", "(" * 400, False),
        ("7", "", False),
        ("7", "\x00", False),
    ],
)
def test_same(gold, answer, equal):
    assert same(gold, answer) is equal
    assert same(answer, gold) is equal


def test_audit_finds_wrong_grades():
    right = {"answer": "0.5", "golds": ["1/3", r"\frac12"], "correct": True}
    missed = right | {"correct": False}
    none = {"answer": None, "golds": ["1"], "correct": False}
    found = audit([right, missed, none])
    assert (found.agreed, found.disagreements) == (2, [missed])


def test_a_row_without_golds_is_named():
    with pytest.raises(UserError, match="row 1 has no golds"):
        audit([{"answer": "1", "correct": True}])
