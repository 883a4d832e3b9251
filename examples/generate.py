"""Sample several answers to a question. They share one prefill of the prompt.

python examples/generate.py MODEL "What is the capital of France?"
"""

import sys

import m1


def main(model: str, question: str) -> None:
    llm = m1.LLM.from_pretrained(model)
    chat = [{"role": "user", "content": question}]
    params = m1.SamplingParams(n=4, max_tokens=64, temperature=0.7, seed=1)
    for sample in llm.generate([chat], params):
        print(f"[{sample.sequence.finish_reason}] {sample.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
