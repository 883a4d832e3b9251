r"""What the answer of a text is."""

import pytest

from m1.grading import extract_answer, with_thought


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
        (r"$\boxed 6$", "6"),
        (r"$\boxed6$. Done.", "6"),
        (r"\boxed 6.5.", "6.5"),
        (r"\boxed -3 is it", "-3"),
        (r"\boxed A", "A"),
        (r"\boxed As said", None),
        (r"\\boxed{840}", "840"),
        (r"\boxed{\frac13} \approx \boxed{0.333}", r"\frac13"),
        (r"\boxed{\sqrt2}, numerically \boxed{\approx 1.41421}", r"\sqrt2"),
        (r"so \boxed{\approx 1.41421}", r"\approx 1.41421"),
        (r"\boxed{5} or \boxed{6} \approx \boxed{6.01}", "5, 6"),
        (r"\boxed{255}. Final Answer: The final answer is $10$. I hope it is correct.", "10"),
        (r"The final answer is $10$. So \boxed{255}", "255"),
        (r"\boxed{255}. The final answer is as above.", "255"),
        ("<answer>6</answer>", "6"),
        ("<answer>\n$6$\n</answer>", "6"),
        (r"\boxed{5} <answer>it is \boxed{6}</answer>", "6"),
        ("<answer>5</answer> <answer>6</answer>", "6"),
        ("<answer></answer> the answer is 7", "7"),
        ("<answer>5", None),
        ("5</answer>", None),
        ("<|begin_of_box|>A<|end_of_box|>", "A"),
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
        (r"\textbf{Answer.} 6", "6"),
        (r"\textbf{Final answer:} $x^2$", "x^2"),
        (r"Answer \( 9 \)", "9"),
        ("#### 42\n\nQuestion: 3+4?\n#### 7", "42"),
        ("The answer is 5.\n\nProblem: 3+4?\nThe answer is 7.", "5"),
        ("Let me see.\nQuestion: 3+4?\nThe answer is 7.", "7"),
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
        ("<think><answer>5</answer></think><answer>6</answer>", "6"),
        ("<think><answer>5</answer></think>", None),
    ],
)
def test_what_stands_behind_the_thought_comes_first(text, expected):
    assert extract_answer(text) == expected


def test_a_prompt_that_opened_the_thought():
    """The text has no tag then, and what it announces in its thought is no answer."""
    text = "Okay. So the answer is 5. Wait, let me check"
    assert extract_answer(text) == "5"
    assert extract_answer(with_thought("<user>?<assistant><think>\n", text)) is None
    assert extract_answer(with_thought("?<think>", r"\boxed{5}. The answer is 6.</think>The answer is 7.")) == "7"
    assert with_thought("Think in <think> tags. ", text) == text


@pytest.mark.parametrize(
    "unit",
    [r"\boxed{", r"\boxed{}", r"\boxed", "{", "}", "\\", "the answer is ", "the answer is $", "answer to ", "answer\n",
     "#### 1", "**", "\n", " ", "$", "</think>", "\x00", "\ud800", "<answer>", "</answer>", "\nQuestion:",
     "final answer is "],
)  # fmt: skip
def test_a_megabyte_is_read_in_linear_time(unit):
    """A quadratic search would take minutes, not a second."""
    assert extract_answer(unit * (1_000_000 // len(unit))) is None
