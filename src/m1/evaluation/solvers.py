"""Solvers for `m1 budget`: each samples a problem for a number of seconds, with this project's engine or with vLLM."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from m1.engine import LLM, SamplingParams
from m1.errors import UserError
from m1.grading import Grader, extract_answer, with_thought
from m1.model.tokenizer import encode_chat
from m1.peers.vllm_client import Worker, start_vllm
from m1.reasoning.budget import Budget
from m1.reasoning.solve import solve
from m1.tasks.prompts import ProblemPrompt


class Ended(NamedTuple):
    """A sample that finished within a problem's time.

    Attributes:
        seconds: from the start of the problem to the end of the sample.
        answer: the final answer; None if the sample has none.
        tokens: number of generated tokens.
    """

    seconds: float
    answer: str | None
    tokens: int


class Solver(Protocol):
    """The interface through which `m1 budget` has an engine sample one problem for a number of seconds.

    A solver draws as many samples as fit. A new one starts whenever another frees its slot.
    """

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """Samples a problem until its time is over.

        Args:
            text: the problem.
            seed: of the sampling.
            seconds: the time.

        Returns:
            The seconds it took, and the finished samples in the order in which they finished.
        """


class EngineSolver:
    """Solves problems with this project's engine, which is warmed up: it compiles and captures graphs when made.

    Its clock includes the vote after each sample, but not the start of a grading worker.

    Args:
        llm: the model.
        prompt: makes the chat messages of a problem.
        prompts: token ids of all prompts to come. They determine the engine's max_model_len.
        params: of the sampling, except for the seed and the number of samples.
        grader: decides which answers are equal.
    """

    def __init__(
        self, llm: LLM, prompt: ProblemPrompt, prompts: list[list[int]], params: SamplingParams, grader: Grader
    ):
        self.llm, self.prompt, self.params, self.grader = llm, prompt, params, grader
        engine = llm.engine_for(prompts, params.max_tokens)
        engine.generate(prompts[:1], replace(params, max_tokens=2, n=engine.num_slots))

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """Solves a problem by voting without an early stop (see `Solver`)."""
        self.grader.start()
        budget = Budget(seconds=seconds, rule="none")
        params = replace(self.params, seed=seed)
        solution = solve(text, self.llm, self.grader, params, budget, prompt=self.prompt)
        return solution.seconds, [Ended(s.seconds, s.answer, s.tokens) for s in solution.samples]


class VLLMSolver:
    """Solves problems with vLLM, which runs in its own process and is warmed up. It ignores the seed.

    Its clock includes sampling only.

    Args:
        llm: gives the tokenizer and the stop tokens.
        ask: sends work to vLLM's process.
        prompt: makes the chat messages of a problem.
        prompts: token ids; the first prompt is used to warm up.
        params: of the sampling: max_tokens, temperature, top_k, top_p and min_p.
    """

    def __init__(self, llm: LLM, ask: Worker, prompt: ProblemPrompt, prompts: list[list[int]], params: SamplingParams):
        self.llm, self.ask, self.prompt, self.params = llm, ask, prompt, params
        self.length = llm.length_for(prompts, params.max_tokens)
        self._sample(prompts[0], replace(params, max_tokens=2), [], 1.0)

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """Samples a problem with vLLM (see `Solver`)."""
        prompt = encode_chat(self.llm.tokenizer, self.prompt.messages(text))
        answer = self._sample(prompt, self.params, self.llm.stop_token_ids, seconds)
        ended = []
        for sample in answer["samples"]:
            text = with_thought(self.llm.decode(prompt), self.llm.decode(sample["token_ids"]))
            ended.append(Ended(sample["seconds"], extract_answer(text), len(sample["token_ids"])))
        return answer["seconds"], ended

    def _sample(self, prompt: list[int], params: SamplingParams, stop: list[int], seconds: float) -> dict[str, Any]:
        new_tokens = min(params.max_tokens, self.length - len(prompt))  # as in this project's engine
        drawn = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return self.ask({"tokens": prompt, "new_tokens": new_tokens, **drawn, "stop": stop, "seconds": seconds})


@contextmanager
def vllm_solver(
    llm: LLM, prompt: ProblemPrompt, prompts: list[list[int]], params: SamplingParams, max_num_seqs: int
) -> Iterator[VLLMSolver]:
    """Runs vLLM on the model of `llm` until the context ends, and yields a solver.

    Raises:
        UserError: vLLM isn't installed or can't run the model, or the model is on a GPU.
    """
    if llm.model.device.type != "cpu":
        raise UserError(f"vllm: `make peers` installs it for CPUs only, but the model is on {llm.model.device}")
    with start_vllm(llm.model, llm.length_for(prompts, params.max_tokens), max_num_seqs) as ask:
        yield VLLMSolver(llm, ask, prompt, prompts, params)
