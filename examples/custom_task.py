"""Measure a model on problems of your own, made in Python.

    python examples/custom_task.py MODEL OUT

On the command line, problems come from a file or a data set: `m1 eval --task my-sums --data sums.jsonl`
(docs/evaluation.md).
"""

import sys

import m1
from m1.evaluation.samplers import EngineSampler
from m1.recipe import EvalSettings
from m1.tasks.problem import Problem


def sums(count: int) -> list[Problem]:
    """Sums of two numbers. An answer that equals any gold is right, however it is written."""
    return [Problem(f"sum-{i}", f"What is {i} + {7 * i}?", answers=(str(8 * i),)) for i in range(count)]


def main(model: str, out: str) -> None:
    llm = m1.LLM.from_pretrained(model)
    settings = EvalSettings(task="my-sums", n=4, max_new_tokens=128)
    result = m1.evaluate(EngineSampler(llm.model, llm.tokenizer, llm=llm), sums(10), settings, out)
    print(f"pass@1 {result['pass@1']:.2f}, maj@4 {result['maj@k']['4']['value']:.2f}; every sample is in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
