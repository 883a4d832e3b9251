"""What a solver makes of vLLM's samples, without vLLM."""

from types import SimpleNamespace

from m1.engine import SamplingParams
from m1.evaluation.solvers import VLLMSolver
from m1.model.tokenizer import byte_tokenizer


def test_a_thought_that_the_prompt_opened_has_no_announced_answer():
    tokenizer = byte_tokenizer()
    llm = SimpleNamespace(tokenizer=tokenizer, decode=tokenizer.decode, stop_token_ids=[])
    tokens = tokenizer("So the answer is 5. Wait").input_ids

    def answers():
        ask = lambda work: {"seconds": 1.0, "samples": [{"seconds": 0.5, "token_ids": tokens}]}  # noqa: E731
        return [ended.answer for ended in VLLMSolver(llm, ask, [[1]], SamplingParams()).solve("?", 0, 1.0)[1]]

    assert answers() == ["5"]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    assert answers() == [None]
