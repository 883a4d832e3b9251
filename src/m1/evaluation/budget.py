"""Accuracy against measured seconds: each problem is solved by voting, and the vote is read off as time goes by.

    OUT/settings.json    what the runs depend on: those of other settings are not mixed in
    OUT/runs.jsonl       a line a model, problem and seed: every sample's answer and the second it ended
    OUT/budget.png       accuracy of each model at each budget
    OUT/budget.json      the same in numbers, written last

A problem gets as many samples as fit into the longest budget. What a shorter one would have answered is the vote of the
samples that had ended by then: until its end a run doesn't depend on how long it may last. Models take turns on each
problem, so a disturbance hits all. Solvers.py says what solves a problem.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine import SamplingParams
from m1.engine.sampling import stream_of
from m1.errors import UserError
from m1.evaluation.folder import SETTINGS, refuse_other_settings
from m1.evaluation.metrics import estimate
from m1.evaluation.solvers import Solver, engine_solver, vllm_solver
from m1.evaluation.tasks import Problem
from m1.jsonl import append_jsonl, drop_torn_line, read_jsonl, write_json
from m1.plots import save_figure
from m1.reasoning.answers import Grader
from m1.reasoning.budget import Budget
from m1.reasoning.solve import chat_prompt
from m1.reasoning.voting import vote

POINTS = 16  # budgets at which accuracy is given, each a fixed factor above the one before
SHORTEST = 1 / 64  # of the longest

Models = dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Settings:
    """What the runs depend on beside models and problems. `max_batch`: samples of a problem decoded together.

    Raises:
        UserError: seconds or seeds that can't be.
    """

    task: str
    seconds: float
    seeds: int
    max_new_tokens: int
    temperature: float
    max_batch: int
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
    texts = [settings.prompt_template.replace("{problem}", problem.text) for problem in problems]
    with Grader() as grader, ExitStack() as stack:
        solvers = _solvers(models, texts, settings, vllm, grader, stack)
        _check(out, settings, solvers, problems)
        drop_torn_line(out / "runs.jsonl")
        runs = list(read_jsonl(out / "runs.jsonl")) if (out / "runs.jsonl").exists() else []
        done = {(run["model"], run["problem"], run["seed"]) for run in runs}
        total = len(solvers) * len(problems) * settings.seeds
        for seed in range(settings.seeds):
            for i, (problem, text) in enumerate(zip(problems, texts, strict=True)):
                for name, solver in solvers.items():
                    on_progress(len(runs), total)
                    if (name, problem.id, seed) in done:
                        continue
                    seconds, samples = solver.solve(text, stream_of(seed, i), settings.seconds)
                    run = {"model": name, "problem": problem.id, "seed": seed, "seconds": seconds, "samples": samples}
                    runs.append(run)
                    append_jsonl(out / "runs.jsonl", [run])
        on_progress(total, total)
        result = {"settings": asdict(settings), "problems": len(problems)}
        result["models"] = {name: curve(runs, name, problems, settings, grader) for name in solvers}
        result["grading"] = dict(grader.counts)
    save_figure(draw(result), out / "budget.png")
    write_json(out / "budget.json", result)
    return result


def curve(
    runs: Sequence[dict[str, Any]], model: str, problems: Sequence[Problem], settings: Settings, grader: Grader
) -> dict[str, Any]:
    """Of one model, at each budget: the share of problems whose vote is right, with its interval over problems; that of
    each seed alone; and the mean number of samples behind a vote. Tokens are those of samples that ended."""
    golds = {problem.id: problem.answers for problem in problems}
    own = [run for run in runs if run["model"] == model]
    points = []
    for i in range(POINTS):
        seconds = settings.seconds * SHORTEST ** (1 - i / (POINTS - 1))
        right: dict[tuple[str, int], bool] = {}
        counts = []
        for run in own:
            answers = [answer for ended, answer, _ in run["samples"] if ended <= seconds]
            counts.append(len(answers))
            winner = vote(answers, grader).answer
            right[run["problem"], run["seed"]] = winner is not None and grader.grade(winner, golds[run["problem"]])
        of_problems = [sum(right[p.id, s] for s in range(settings.seeds)) / settings.seeds for p in problems]
        of_seeds = [sum(right[p.id, s] for p in problems) / len(problems) for s in range(settings.seeds)]
        accuracy = estimate(of_problems)
        points.append(
            {"seconds": seconds, "accuracy": accuracy.value, "ci95": accuracy.ci95, "of_seeds": of_seeds}
            | {"samples": sum(counts) / len(counts)}
        )
    ended = [tokens for run in own for _, _, tokens in run["samples"]]
    return {
        "points": points,
        "tokens_per_second": sum(ended) / sum(run["seconds"] for run in own),
        "tokens_per_sample": sum(ended) / max(1, len(ended)),
    }


def draw(result: dict[str, Any]) -> Figure:
    """Accuracy, and the samples behind a vote, against seconds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    accuracy, samples = figure.subplots(1, 2)
    for name, model in result["models"].items():
        points = model["points"]
        seconds = [point["seconds"] for point in points]
        middle = [point["accuracy"] for point in points]
        accuracy.plot(seconds, middle, marker=".", label=name)
        low, high = ([m + sign * p["ci95"] for m, p in zip(middle, points, strict=True)] for sign in (-1, 1))
        accuracy.fill_between(seconds, low, high, alpha=0.15)
        samples.plot(seconds, [point["samples"] for point in points], marker=".", label=name)
    accuracy.set(xscale="log", xlabel="seconds a problem, measured", ylabel="accuracy of the vote", ylim=(0, 1.02))
    samples.set(xscale="log", xlabel="seconds a problem, measured", ylabel="samples behind the vote")
    for axes in (accuracy, samples):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _solvers(
    models: Models, texts: Sequence[str], settings: Settings, vllm: Sequence[str], grader: Grader, stack: ExitStack
) -> dict[str, Solver]:
    """All ready to be measured; those that have to be ended are on the stack."""
    params = SamplingParams(max_tokens=settings.max_new_tokens, temperature=settings.temperature)
    if unknown := [name for name in vllm if name not in models]:
        raise UserError(f"vllm {unknown[0]!r}: give the name of one of the models, {', '.join(models)}")
    solvers: dict[str, Solver] = {}
    for name, (model, tokenizer) in models.items():
        prompts = [chat_prompt(tokenizer, text) for text in texts]
        solvers[name] = engine_solver(model, tokenizer, prompts, params, settings.max_batch, grader)
        if name in vllm:
            peer = vllm_solver(model, tokenizer, prompts, params, settings.max_batch)
            solvers[f"{name}, vLLM"] = stack.enter_context(peer)
    return solvers


def _check(out: Path, settings: Settings, solvers: Mapping[str, Solver], problems: Sequence[Problem]) -> None:
    """Runs of other settings, models or problems would be mixed into the curve."""
    current = asdict(settings) | {"models": {name: solver.identity() for name, solver in solvers.items()}}
    current = json.loads(json.dumps(current | {"problems": [asdict(problem) for problem in problems]}))
    refuse_other_settings(out, current, "runs", {"models": "other models", "problems": "other problems"})
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS, current)
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from None
