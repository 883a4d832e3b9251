r"""What the answer of a text is."""

import pytest

from m1.grading import extract_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{4} and an open \boxed{5", "4"),
        (r"\boxed{5", None),
        (r"\boxed{4} \boxed{}", "4"),
        (r"\boxed{\boxed{}}", None),
        (r"\boxed{\boxed{6}}", "6"),
        (r"} \boxed{7}", "7"),
        (r"$\boxed{1}$, \boxed{2} \quad \text{and} \quad \boxed{3}", "1, 2, 3"),
        (r"\boxed{1} papers and \boxed{2} bins", "2"),
        (r"The answer is 8. \boxed{7}", "7"),
        ("7", None),
        ("", None),
    ],
)
def test_extract_box(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        (r"the answer is \(x^2\), which is even", "x^2"),
        ("The answer is 5. No: the answer is 42 because 6*7=42", "42"),
        ("The answer is 42 apples.", "42 apples"),
        ("The answer is x = 5.", "x = 5"),
        ("The correct answer is (B).", "(B)"),
        ("The answer is $5$ or $6$.", "5 or 6"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**\n\n42", "42"),
        ("    # Answer\n\n    3.21\n", "3.21"),
        ("### Final Answer\n\\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}"),
        ("6*7=42\n#### 42", "42"),
        ("...\nSo she sold **72 clips**.", "72 clips"),
        ("the answer is 5\n\nSo it is **6**", "6"),
        # None is better than nonsense.
        ("The answer is not obvious.", None),
        ("The answer is Evelyn.", None),
        ("The answer is 5? Hardly.", None),
        ("The answer is 3 times that.", None),
        ("The answer is $5 more than $3", None),
        ("Answer: 3 hours and 20 minutes", None),
        ("the answer is between 3 and 5", None),
        (r"The answer is $\boxed{5", None),
        ("#### Step 4", None),
        ("#### 4. Compute", None),
        ("**3. Check**", None),
        ("either **5** or **6**", None),
    ],
)
def test_extract_announced(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<think>\boxed{5}</think> \boxed{6}", "6"),
        (r"<think>\boxed{5}</think> The answer is 6.", "6"),
        (r"<think>\boxed{5}</think> Done.", "5"),
        (r"<think>\boxed{5} the answer is 6", "5"),
        ("<think>the answer is 5</think> Done.", None),
        ("<think>So the answer is 5. Wait,", None),
        (r"\boxed{4}</think>\boxed{5}</think>", "5"),
    ],
)
def test_what_stands_behind_the_thought_comes_first(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "unit",
    [r"\boxed{", r"\boxed{}", r"\boxed", "{", "}", "\\", "the answer is ", "the answer is $", "answer to ", "answer\n",
     "#### 1", "**", "\n", " ", "$", "</think>", "\x00", "\ud800"],
)  # fmt: skip
def test_a_megabyte_is_read_in_linear_time(unit):
    """A quadratic search would take minutes, not a second."""
    assert extract_answer(unit * (1_000_000 // len(unit))) is None
