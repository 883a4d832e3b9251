r"""Weigh votes with a verifier of your own: here the share of a sample's written products and sums that are right.

    python examples/custom_verifier.py MODEL "What is 6 * 7 + 5?"

A verifier is any callable (problem, texts) -> scores. `bound` is the largest score: the rule "decided" needs it.
"""

import operator
import re
import sys
from collections.abc import Sequence

import m1

STEP = re.compile(r"(\d+)\s*([-+*])\s*(\d+)\s*=\s*(-?\d+)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class StepsAreRight:
    """Scores a text by the share of right ones among its steps such as `6 * 7 = 42`; 0.5 for a text without any."""

    bound = 1.0

    def __call__(self, problem: str, texts: Sequence[str]) -> list[float]:
        return [self.score(text) for text in texts]

    def score(self, text: str) -> float:
        right = [OPERATORS[sign](int(a), int(b)) == int(result) for a, sign, b, result in STEP.findall(text)]
        return sum(right) / len(right) if right else 0.5


def main(model: str, problem: str) -> None:
    llm = m1.LLM.from_pretrained(model)
    params = m1.SamplingParams(max_tokens=256, temperature=0.7)
    with m1.Grader() as grader:
        solution = m1.solve(problem, llm, grader, params, m1.Budget(n=16), weights=StepsAreRight())
    print(f"answer {solution.answer}: weights {solution.vote.weights}")


if __name__ == "__main__":
    main(*sys.argv[1:])
