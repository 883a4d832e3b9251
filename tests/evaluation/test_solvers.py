"""What a solver makes of vLLM's samples, without vLLM."""

from checkpoints import tiny_teacher

from m1.engine import LLM, SamplingParams
from m1.evaluation.solvers import VLLMSolver
from m1.model.tokenizer import byte_tokenizer
from m1.tasks.prompts import PLAIN, ProblemPrompt


def test_a_thought_that_the_prompt_opened_has_no_announced_answer():
    tokenizer = byte_tokenizer()
    llm = LLM(tiny_teacher(), tokenizer)
    tokens = tokenizer("So the answer is 5. Wait").input_ids

    def answers():
        ask = lambda work: {"seconds": 1.0, "samples": [{"seconds": 0.5, "token_ids": tokens}]}  # noqa: E731
        return [ended.answer for ended in VLLMSolver(llm, ask, PLAIN, [[1]], SamplingParams()).solve("?", 0, 1.0)[1]]

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

    solver = VLLMSolver(LLM(model, byte_tokenizer()), ask, PLAIN, prompts, SamplingParams(max_tokens=100))
    for prompt in prompts:
        solver._sample(prompt, solver.params, [], 1.0)
    assert asked == [(10, 2), (10, 100), (500, 12)]


def test_vllm_gets_the_sampling_and_the_prompt():
    tokenizer, asked = byte_tokenizer(), []
    ask = lambda work: asked.append(work) or {"seconds": 1.0, "samples": []}  # noqa: E731
    params = SamplingParams(max_tokens=9, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1)
    VLLMSolver(LLM(tiny_teacher(), tokenizer), ask, ProblemPrompt("Q {problem}", "S"), [[1]], params).solve("?", 0, 1.0)
    drawn = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    assert [{name: work[name] for name in drawn} for work in asked] == [drawn, drawn]
    assert tokenizer.decode(asked[1]["tokens"]) == "<|system|>S<|end|><|user|>Q ?<|end|><|assistant|>"
