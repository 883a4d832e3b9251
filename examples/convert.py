"""Turn a transformer into a hybrid.

    python examples/convert.py TEACHER OUT

TEACHER is a folder, an id on the Hub or a GGUF file of a Llama, Qwen2 or Qwen3 model. A quarter of the layers stay
attention. Weights are copied, and nothing is trained: distil the hybrid before you use it (docs/training.md).
"""

import sys

import m1


def main(teacher: str, out: str) -> None:
    config = m1.convert(teacher, out, attention_ratio=0.25).config
    print(f"{out}: {config.num_hidden_layers} layers; {config.attention_layers} stay attention")


if __name__ == "__main__":
    main(*sys.argv[1:])
