"""Training rows under a published tokenizer and chat template."""

import pytest

from m1.model.checkpoint import load_tokenizer
from m1.model.tokenizer import encode_chat
from m1.train.data_mask import IGNORED, ChatEncoder, Conversation

ANSWERS = ["4", "Paris.", "\n\n  x = 2\n", "👨‍👩‍👧 und 你好", "<think>\nhm\n</think>\n\n\\boxed{4}", "a<|im_end|>b"]


@pytest.fixture(scope="module")
def tokenizer(smol_dir):
    return load_tokenizer(smol_dir)


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_answer_follows_the_inference_prompt(tokenizer, answer):
    """What comes before the trained tokens is the prompt that a server sends, token for token."""
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer}]
    (example,) = ChatEncoder(tokenizer).encode([Conversation("row 1", messages)])
    trained = example.labels != IGNORED
    start, stop = trained.argmax(), len(trained) - trained[::-1].argmax()
    assert trained[start:stop].all() and example.labels[stop - 1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.labels[trained]) == f"{answer}<|im_end|>"
    assert example.input_ids[:start].tolist() == encode_chat(tokenizer, messages[:1])
    plain = encode_chat(tokenizer, messages, add_generation_prompt=False)
    assert (example.input_ids.tolist() == plain) is not answer.startswith("\n")  # which merges with the prompt's end
