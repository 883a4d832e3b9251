"""What solves a problem for a number of seconds, for `m1 budget`: this project's engine, or vLLM beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine import Engine, SamplingParams, max_len_for, stop_tokens
from m1.errors import UserError
from m1.peers.vllm_client import Ask, start_vllm
from m1.reasoning.answers import Grader, extract_answer
from m1.reasoning.budget import Budget
from m1.reasoning.solve import chat_prompt, solve


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

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    params: SamplingParams
    grader: Grader

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        self.grader.start()
        budget = Budget(seconds=seconds, rule="none")
        solution = solve(text, self.engine, self.tokenizer, self.grader, replace(self.params, seed=seed), budget)
        return solution.seconds, [Ended(s.seconds, s.answer, s.tokens) for s in solution.samples]


@dataclass
class VLLMSolver:
    """vLLM in a process of its own. Nothing but sampling is on its clock; it has no seed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ask: Ask
    params: SamplingParams

    def solve(self, text: str, seed: int, seconds: float) -> tuple[float, list[Ended]]:
        stop = stop_tokens(self.model, self.tokenizer)
        work = {"tokens": chat_prompt(self.tokenizer, text), "new_tokens": self.params.max_tokens, "stop": stop}
        answer = self.ask(work | {"temperature": self.params.temperature, "seconds": seconds})
        ended = []
        for sample in answer["samples"]:
            text = self.tokenizer.decode(sample["token_ids"], skip_special_tokens=True)
            ended.append(Ended(sample["seconds"], extract_answer(text), len(sample["token_ids"])))
        return answer["seconds"], ended


def engine_solver(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: SamplingParams,
    max_batch: int,
    grader: Grader,
) -> EngineSolver:
    """Warm: what compiles or captures has done so."""
    max_len = max_len_for(model, prompts, params.max_tokens)
    engine = Engine(model, stop_tokens(model, tokenizer), max_batch, max_len, snapshots=0)
    engine.generate(prompts[:1], replace(params, max_tokens=2), max_batch)
    return EngineSolver(model, tokenizer, engine, params, grader)


@contextmanager
def vllm_solver(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: SamplingParams,
    max_batch: int,
) -> Iterator[VLLMSolver]:
    """Warm, too.

    Raises:
        UserError: vLLM isn't installed or can't run the model, or the model is on a GPU.
    """
    if model.device.type != "cpu":
        raise UserError(f"vllm: `make peers` installs it for CPUs, and the model is on {model.device}")
    with start_vllm(model, max_len_for(model, prompts, params.max_tokens), max_batch) as ask:
        solver = VLLMSolver(model, tokenizer, ask, params)
        ask({"tokens": prompts[0], "new_tokens": 2, "temperature": params.temperature, "stop": [], "seconds": 1.0})
        yield solver
