"""Accuracy against measured seconds: each problem is solved by voting, and the vote is read off as time goes by.

    OUT/settings.json    what the runs depend on: those of other settings are not mixed in
    OUT/runs.jsonl       a line a model, problem and seed: every sample's answer and the second it ended
    OUT/budget.png       accuracy of each model at each budget
    OUT/budget.json      the same in numbers, written last

A problem gets as many samples as fit into the longest budget. What a shorter one would have answered is the vote of the
samples that had ended by then: until its end a run doesn't depend on how long it may last. Models take turns on each
problem, so a disturbance hits all. solvers.py says what solves a problem.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine import LLM, SamplingParams, fold_in
from m1.errors import UserError
from m1.evaluation.budget_curve import draw, summarize
from m1.evaluation.folder import SETTINGS, refuse_other_settings
from m1.evaluation.generators import weights_hash
from m1.evaluation.solvers import EngineSolver, Solver, vllm_solver
from m1.evaluation.tasks import Problem
from m1.jsonl import append_jsonl, drop_torn_line, read_jsonl, write_json
from m1.model.tokenizer import encode_chat
from m1.peers.vllm_client import version
from m1.plots import save_figure
from m1.reasoning.answers import Grader
from m1.reasoning.budget import Budget

Models = dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Settings:
    """What the runs depend on beside models and problems. `max_num_seqs`: samples of a problem decoded together.

    Raises:
        UserError: seconds or seeds that can't be.
    """

    task: str
    seconds: float
    seeds: int
    max_new_tokens: int
    temperature: float
    max_num_seqs: int
    prompt_template: str = "{problem}"

    def __post_init__(self) -> None:
        Budget(seconds=self.seconds)
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds}: need at least one")


def measure_budgets(
    models: Models,
    problems: Sequence[Problem],
    settings: Settings,
    out: Path,
    vllm: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns what it writes to OUT/budget.json. A run that was cut off measures only what is missing.

    Args:
        vllm: names of models that vLLM samples, too; its results are under "NAME, vLLM".

    Raises:
        UserError: a prompt the engine refuses, a model that vLLM can't run, or an OUT with runs of other settings.
    """
    if unknown := [name for name in vllm if name not in models]:
        raise UserError(f"vllm {unknown[0]!r}: give the name of one of the models, {', '.join(models)}")
    names = [own for name in models for own in (name, *([_under_vllm(name)] if name in vllm else []))]
    _check(out, settings, _identities(models, vllm), problems)
    drop_torn_line(out / "runs.jsonl")
    runs = list(read_jsonl(out / "runs.jsonl")) if (out / "runs.jsonl").exists() else []
    done = {(run["model"], run["problem"], run["seed"]) for run in runs}
    jobs = [(seed, i, name) for seed in range(settings.seeds) for i in range(len(problems)) for name in names]
    missing = [(seed, i, name) for seed, i, name in jobs if (name, problems[i].id, seed) not in done]
    texts = [settings.prompt_template.replace("{problem}", problem.text) for problem in problems]
    with Grader() as grader, ExitStack() as stack:
        solvers = _solvers(models, texts, settings, vllm, grader, stack) if missing else {}
        for seed, i, name in missing:
            on_progress(len(runs), len(jobs))
            seconds, samples = solvers[name].solve(texts[i], fold_in(seed, i), settings.seconds)
            run = {"model": name, "problem": problems[i].id, "seed": seed, "seconds": seconds, "samples": samples}
            runs.append(run)
            append_jsonl(out / "runs.jsonl", [run])
        on_progress(len(jobs), len(jobs))
        result = {"settings": asdict(settings), "problems": len(problems)}
        result |= summarize(runs, names, problems, settings.seconds, grader)
        result["grading"] = dict(grader.counts)
    save_figure(draw(result), out / "budget.png")
    write_json(out / "budget.json", result)
    return result


def _under_vllm(name: str) -> str:
    return f"{name}, vLLM"


def _identities(models: Models, vllm: Sequence[str]) -> dict[str, str]:
    """What each model's runs must have in common to be counted together."""
    own = {name: weights_hash(model) for name, (model, _) in models.items()}
    return own | {_under_vllm(name): f"vLLM {version()}, {own[name]}" for name in vllm}


def _solvers(
    models: Models, texts: Sequence[str], settings: Settings, vllm: Sequence[str], grader: Grader, stack: ExitStack
) -> dict[str, Solver]:
    """All ready to be measured; those that have to be ended are on the stack."""
    params = SamplingParams(max_tokens=settings.max_new_tokens, temperature=settings.temperature)
    solvers: dict[str, Solver] = {}
    for name, (model, tokenizer) in models.items():
        prompts = [encode_chat(tokenizer, text) for text in texts]
        llm = LLM(model, tokenizer, max_num_seqs=settings.max_num_seqs, prefix_cache=0)
        solvers[name] = EngineSolver(llm, prompts, params, grader)
        if name in vllm:
            peer = vllm_solver(llm, prompts, params, settings.max_num_seqs)
            solvers[_under_vllm(name)] = stack.enter_context(peer)
    return solvers


def _check(out: Path, settings: Settings, identities: dict[str, str], problems: Sequence[Problem]) -> None:
    """Runs of other settings, models or problems would be mixed into the curve."""
    current = asdict(settings) | {"models": identities}
    current = json.loads(json.dumps(current | {"problems": [asdict(problem) for problem in problems]}))
    refuse_other_settings(out, current, "runs", {"models": "other models", "problems": "other problems"})
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS, current)
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from None
