"""Measure a model on a benchmark's file and compare it with an earlier result.

    python examples/evaluate.py MODEL OUT gsm8k.jsonl [OTHER_OUT]

A run that was interrupted resumes, and a finished one is read. The command line's twin: `m1 eval`, `m1 eval compare`.
"""

import sys
from pathlib import Path

import m1
from m1.evaluation.compare import compare
from m1.evaluation.samplers import EngineSampler
from m1.recipe import EvalSettings
from m1.tasks.benchmarks import load_task


def main(model: str, out: str, data: str, other: str | None = None) -> None:
    llm = m1.LLM.from_pretrained(model)
    problems = load_task("gsm8k", data, limit=20)
    settings = EvalSettings(task="gsm8k", n=4, max_new_tokens=256)
    result = m1.evaluate(EngineSampler(llm.model, llm.tokenizer, llm=llm), problems, settings, out)
    low, high = result["pass@1_ci95"]
    print(f"pass@1 {result['pass@1']:.3f} [{low:.3f}, {high:.3f}], {result['tokens_per_second']:.0f} tokens/s")
    if other:
        print(compare(Path(other), Path(out)))


if __name__ == "__main__":
    main(*sys.argv[1:])
