"""What a solver makes of vLLM's samples, without vLLM."""

from checkpoints import tiny_teacher

from m1.engine import LLM, SamplingParams
from m1.evaluation.solvers import VLLMSolver
from m1.model.tokenizer import byte_tokenizer


def test_a_thought_that_the_prompt_opened_has_no_announced_answer():
    tokenizer = byte_tokenizer()
    llm = LLM(tiny_teacher(), tokenizer)
    tokens = tokenizer("So the answer is 5. Wait").input_ids

    def answers():
        ask = lambda work: {"seconds": 1.0, "samples": [{"seconds": 0.5, "token_ids": tokens}]}  # noqa: E731
        return [ended.answer for ended in VLLMSolver(llm, ask, [[1]], SamplingParams()).solve("?", 0, 1.0)[1]]

    assert answers() == ["5"]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    assert answers() == [None]


def test_vllm_samples_end_with_the_context(tmp_path):
    """As this project's do: a prompt that leaves too little for max_tokens isn't refused in the middle of a run."""
    model = tiny_teacher()  # its context is 512 tokens
    prompts, asked = [[1] * 10, [1] * 500], []

    def ask(work):
        asked.append((len(work["tokens"]), work["new_tokens"]))
        return {"seconds": 1.0, "samples": []}

    solver = VLLMSolver(LLM(model, byte_tokenizer()), ask, prompts, SamplingParams(max_tokens=100))
    for prompt in prompts:
        solver._sample(prompt, solver.params, [], 1.0)
    assert asked == [(10, 2), (10, 100), (500, 12)]
