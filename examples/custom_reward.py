r"""A reward of your own for RL: a table `[rewards]` in a grpo stage's TOML names it by file and function.

    [rewards]
    correct = 1.0
    "examples/custom_reward.py:brief" = 0.2

A reward gets the completions, the prompts and the rows' columns, as keyword arguments. It returns one number per
completion, or None for one that it can't judge. Run alone, this file shows the rewards of two completions:

    python examples/custom_reward.py
"""

from typing import Any

WORDS = 200


def brief(completions: list[list[dict[str, str]]], **columns: Any) -> list[float | None]:
    """1 for an empty completion, falling to 0 at WORDS words."""
    lengths = [len(messages[-1]["content"].split()) for messages in completions]
    return [max(0.0, 1 - length / WORDS) for length in lengths]


if __name__ == "__main__":
    texts = [r"6 * 7 = 42, so \boxed{42}", "Let me think about this. " * 30]
    print(brief([[{"role": "assistant", "content": text}] for text in texts]))
