"""Answer a question by voting, within samples and seconds.

python examples/solve.py MODEL "What is 6 * 7?"
"""

import sys

import m1


def main(model: str, problem: str) -> None:
    llm = m1.LLM.from_pretrained(model)
    params = m1.SamplingParams(max_tokens=256, temperature=0.7)
    budget = m1.Budget(n=16, seconds=20, rule="decided")  # whichever comes first
    with m1.Grader() as grader:
        solution = m1.solve(problem, llm, grader, params, budget)
    print(
        f"answer {solution.answer}: votes {solution.vote.counts}, {solution.tokens} tokens, stopped: {solution.reason}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
