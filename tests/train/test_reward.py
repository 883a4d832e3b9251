"""GRPO's reward: 1 for a right final answer, else 0."""

from m1.grading import Grader
from m1.model.tokenizer import byte_tokenizer
from m1.train.rewards import correctness


def test_rewards():
    tokenizer, prompts = byte_tokenizer(), [[{"role": "user", "content": "?"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in (r"\boxed{5}", "the answer is 5. Wait", "6")]

    def rewards():
        return correctness(Grader(), tokenizer)(prompts=prompts, completions=completions, answers=[["5"]] * 3, step=1)

    assert rewards() == [1.0, 1.0, 0.0]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    assert rewards() == [1.0, 0.0, 0.0]  # a thought announces no answer
