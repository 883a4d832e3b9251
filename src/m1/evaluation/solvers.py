"""What solves a problem for a number of seconds, for `m1 budget`: this project's engine, or vLLM beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

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


@dataclass
class EngineSolver:
    """This project's engine. Voting, after each sample, is on its clock; the start of a grading worker isn't."""

    llm: LLM
    params: SamplingParams
    grader: Grader

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        self.grader.start()
        budget = Budget(seconds=seconds, rule="none")
        solution = solve(text, self.llm, self.grader, replace(self.params, seed=seed), budget)
        return solution.seconds, [Ended(s.seconds, s.answer, s.tokens) for s in solution.samples]


@dataclass
class VLLMSolver:
    """vLLM in a process of its own. Nothing but sampling is on its clock; it has no seed."""

    llm: LLM
    ask: Ask
    params: SamplingParams

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        prompt, stop = encode_chat(self.llm.tokenizer, text), self.llm.stop_token_ids
        work = {"tokens": prompt, "new_tokens": self.params.max_tokens, "stop": stop}
        answer = self.ask(work | {"temperature": self.params.temperature, "seconds": seconds})
        ended = []
        for sample in answer["samples"]:
            text = self.llm.decode(sample["token_ids"])
            ended.append(Ended(sample["seconds"], extract_answer(text), len(sample["token_ids"])))
        return answer["seconds"], ended


def engine_solver(llm: LLM, prompts: list[list[int]], params: SamplingParams, grader: Grader) -> EngineSolver:
    """Warm: what compiles or captures has done so."""
    engine = llm.engine_for(prompts, params.max_tokens)
    engine.generate(prompts[:1], replace(params, max_tokens=2, n=engine.num_slots))
    return EngineSolver(llm, params, grader)


@contextmanager
def vllm_solver(llm: LLM, prompts: list[list[int]], params: SamplingParams, max_num_seqs: int) -> Iterator[VLLMSolver]:
    """Warm, too.

    Raises:
        UserError: vLLM isn't installed or can't run the model, or the model is on a GPU.
    """
    if llm.model.device.type != "cpu":
        raise UserError(f"vllm: `make peers` installs it for CPUs, and the model is on {llm.model.device}")
    with start_vllm(llm.model, llm.length_for(prompts, params.max_tokens), max_num_seqs) as ask:
        solver = VLLMSolver(llm, ask, params)
        ask({"tokens": prompts[0], "new_tokens": 2, "temperature": params.temperature, "stop": [], "seconds": 1.0})
        yield solver
