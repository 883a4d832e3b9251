"""What solves a problem for a number of seconds, for `m1 budget`: this project's engine, or vLLM beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from m1.engine import LLM, SamplingParams
from m1.errors import UserError
from m1.model.tokenizer import encode_chat
from m1.peers.vllm_client import Ask, start_vllm
from m1.reasoning.answers import Grader, extract_answer
from m1.reasoning.budget import Budget
from m1.reasoning.solve import solve


class Ended(NamedTuple):
    """A sample that ended by itself: when, its answer and its tokens."""

    seconds: float
    answer: str | None
    tokens: int


class Solver(Protocol):
    """Draws samples of a problem, as many as fit, each in a slot that another has left."""

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        """How long it took, and the samples in the order they ended."""


class EngineSolver:
    """This project's engine, warm: what compiles or captures has done so.

    Voting, after each sample, is on its clock; the start of a grading worker isn't.
    """

    def __init__(self, llm: LLM, prompts: list[list[int]], params: SamplingParams, grader: Grader):
        self.llm, self.params, self.grader = llm, params, grader
        engine = llm.engine_for(prompts, params.max_tokens)
        engine.generate(prompts[:1], replace(params, max_tokens=2, n=engine.num_slots))

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        self.grader.start()
        budget = Budget(seconds=seconds, rule="none")
        solution = solve(text, self.llm, self.grader, replace(self.params, seed=seed), budget)
        return solution.seconds, [Ended(s.seconds, s.answer, s.tokens) for s in solution.samples]


class VLLMSolver:
    """vLLM in a process of its own, warm, too. Nothing but sampling is on its clock; it has no seed."""

    def __init__(self, llm: LLM, ask: Ask, prompts: list[list[int]], params: SamplingParams):
        self.llm, self.ask, self.params = llm, ask, params
        self._sample(prompts[0], replace(params, max_tokens=2), [], 1.0)

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        prompt = encode_chat(self.llm.tokenizer, text)
        answer = self._sample(prompt, self.params, self.llm.stop_token_ids, seconds)
        ended = []
        for sample in answer["samples"]:
            text = self.llm.decode(sample["token_ids"])
            ended.append(Ended(sample["seconds"], extract_answer(text), len(sample["token_ids"])))
        return answer["seconds"], ended

    def _sample(self, prompt: list[int], params: SamplingParams, stop: list[int], seconds: float) -> dict[str, Any]:
        work = {"tokens": prompt, "new_tokens": params.max_tokens, "temperature": params.temperature}
        return self.ask(work | {"stop": stop, "seconds": seconds})


@contextmanager
def vllm_solver(llm: LLM, prompts: list[list[int]], params: SamplingParams, max_num_seqs: int) -> Iterator[VLLMSolver]:
    """Raises UserError: vLLM isn't installed or can't run the model, or the model is on a GPU."""
    if llm.model.device.type != "cpu":
        raise UserError(f"vllm: `make peers` installs it for CPUs, and the model is on {llm.model.device}")
    with start_vllm(llm.model, llm.length_for(prompts, params.max_tokens), max_num_seqs) as ask:
        yield VLLMSolver(llm, ask, prompts, params)
