"""Accuracy against measured seconds: problems are solved by voting, and the vote is evaluated at many points in time.

    OUT/settings.json    what the runs depend on (runs.py)
    OUT/runs.jsonl       one line per model, problem and seed: each sample's time of finishing, answer and tokens
    OUT/problems.jsonl   the problems and golds
    OUT/budget.json      accuracy of each model at each budget, and the machine that measured the last
    OUT/budget.png       the same as a figure; written last, and if it can't be, only a warning is logged

A problem gets as many samples as fit into the longest budget. The answer under a shorter budget is the vote over the
samples that had finished by then, because sampling doesn't depend on the time that is left. Models take turns on each
problem, so a disturbance affects all of them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine import LLM, SamplingParams, fold_in
from m1.errors import UserError
from m1.evaluation.curves import accuracy_curves, draw
from m1.evaluation.endpoint import EndpointSampler
from m1.evaluation.solvers import solve_served, vllm_solver
from m1.grading import Grader
from m1.jsonl import as_written, to_jsonl, write_json, write_text
from m1.machine import describe_machine
from m1.model.checkpoint import load_model, weights_hash
from m1.ops.backend import default_device
from m1.peers.vllm_client import version
from m1.plots import save_figure
from m1.progress import OnProgress, Progress, ignore, silent
from m1.reasoning.budget import Budget
from m1.reasoning.solution import Solution
from m1.reasoning.solve import solve
from m1.recipe import BudgetSettings, BudgetStage
from m1.runs import Run, versions
from m1.tasks.benchmarks import load_task
from m1.tasks.problem import Problem, problems_hash
from m1.tasks.prompts import ProblemPrompt

# What a line of runs.jsonl holds.
ROW = {"model": str, "problem": str, "seed": int, "seconds": float, "samples": list[Any]}

logger = logging.getLogger(__name__)

Models = dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]
Solve = Callable[..., Solution]  # `solve` of one model, or `solve_served` of one sampler


def run(stage: BudgetStage, force: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Runs the budget stage of a recipe, and `m1 budget`. Returns the content of budget.json."""
    problems = load_task(stage.task, stage.data, stage.limit, stage, columns=stage)
    models = {name: load_model(folder, dtype=stage.dtype or "auto") for name, folder in stage.models.items()}
    with progress("budget", "runs") as on_progress:
        return measure_budgets(models, problems, stage, Path(stage.out), stage.vllm, on_progress, force)


def measure_budgets(
    models: Models,
    problems: Sequence[Problem],
    settings: BudgetSettings,
    out: Path,
    vllm: Sequence[str] = (),
    on_progress: OnProgress = ignore,
    force: bool = False,
    served: Mapping[str, EndpointSampler] = MappingProxyType({}),
) -> dict[str, Any]:
    """Measures models on the same problems under a time budget. An interrupted measurement resumes.

    Args:
        models: name -> model and tokenizer. The others are compared with the first.
        problems: what to solve.
        settings: task, sampling and budget.
        out: the output folder.
        vllm: names of models that vLLM samples as well. Its results are called "NAME, vLLM".
        on_progress: called with the number of finished runs and of all runs.
        force: move `out` aside if it holds something else.
        served: further models by name, which servers sample.

    Returns:
        The content of OUT/budget.json.

    Raises:
        UserError: a prompt the engine refuses, models of unlike dtypes without `settings.dtype`, a model that vLLM
            can't run, or an `out` with runs of other settings.
    """
    if unknown := [name for name in vllm if name not in models]:
        raise UserError(f"vllm {unknown[0]!r}: give the name of one of the models, {', '.join(models)}")
    _check_dtypes(models, settings, vllm)
    prompt = settings.task_prompt()
    used = settings.used(BudgetSettings, prompt)
    depends = settings.settings() if isinstance(settings, BudgetStage) else used
    depends |= {
        "prompt": prompt.settings(),
        "weights": _identities(models, vllm) | {name: f"endpoint, {sampler.model}" for name, sampler in served.items()},
        "problems_sha256": problems_hash(problems),
    }
    names = [own for name in models for own in (name, *([_under_vllm(name)] if name in vllm else []))] + list(served)
    with Run("budget", out, depends, force=force) as run, Grader() as grader, ExitStack() as stack:
        rows = run.read("runs.jsonl", ROW)
        done = {(row["model"], row["problem"], row["seed"]) for row in rows}
        jobs = [(seed, i, name) for seed in range(settings.seeds) for i in range(len(problems)) for name in names]
        missing = [(seed, i, name) for seed, i, name in jobs if (name, problems[i].id, seed) not in done]
        params, budget = SamplingParams.of(settings), Budget(seconds=settings.seconds, rule="none")
        solvers = _solvers(models, problems, prompt, settings, vllm, stack) if missing else {}
        solvers |= {name: partial(solve_served, sampler=sampler) for name, sampler in served.items()}
        for seed, i, name in missing:
            on_progress(len(rows), len(jobs))
            grader.start()  # before the clock
            drawn = replace(params, seed=fold_in(seed, i))
            solved = solvers[name](problems[i].text, grader=grader, params=drawn, budget=budget, prompt=prompt)
            samples = [(sample.seconds, sample.answer, sample.tokens) for sample in solved.samples]
            row = {
                "model": name,
                "problem": problems[i].id,
                "seed": seed,
                "seconds": solved.seconds,
                "samples": samples,
            }
            rows.append(row)
            run.append("runs.jsonl", row)
        on_progress(len(jobs), len(jobs))
        machine = describe_machine(torch.device(default_device()))
        result = {"machine": machine, "settings": used, "problems": len(problems), "versions": versions()}
        with as_written(run.folder / "runs.jsonl"):
            result |= accuracy_curves(rows, names, problems, settings.seconds, grader)
        result["grading"] = dict(grader.counts)
        write_text(run.folder / "problems.jsonl", to_jsonl(map(asdict, problems)))
        write_json(run.folder / "budget.json", result)
        try:
            save_figure(draw(result), run.folder / "budget.png")
        except UserError as error:  # budget.json has the same numbers
            logger.warning("%s", error)
        run.finish()
    return result


def _check_dtypes(models: Models, settings: BudgetSettings, vllm: Sequence[str]) -> None:
    """Refuses a comparison whose models differ in more than their layers, unless the settings ask for it."""
    dtypes = {name: str(model.dtype).removeprefix("torch.") for name, (model, _) in models.items()}
    if settings.dtype is None and len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
        raise UserError(
            f"unlike dtypes: {found}; one of them would be faster for that alone. Give a dtype, e.g. "
            "--dtype bfloat16, or --dtype auto to compare them as they are"
        )
    if settings.quantize and vllm:
        raise UserError(f"quantize {settings.quantize}: vLLM samples without it; leave out one of the two")


def _under_vllm(name: str) -> str:
    return f"{name}, vLLM"


def _identities(models: Models, vllm: Sequence[str]) -> dict[str, str]:
    """An identity per model. Only runs of the same identity are counted together."""
    own = {name: weights_hash(model) for name, (model, _) in models.items()}
    return own | {_under_vllm(name): f"vLLM {version()}, by its server, {own[name]}" for name in vllm}


def _solvers(
    models: Models,
    problems: Sequence[Problem],
    prompt: ProblemPrompt,
    settings: BudgetSettings,
    vllm: Sequence[str],
    stack: ExitStack,
) -> dict[str, Solve]:
    """What solves with each model, warmed up. The stack ends vLLM's servers."""
    params, slots = SamplingParams.of(settings), settings.max_num_seqs
    solvers: dict[str, Solve] = {}
    for name, (model, tokenizer) in models.items():
        llm = LLM(model, tokenizer, max_num_seqs=slots, prefix_cache=0, quantize=settings.quantize)
        prompts = [llm.encode(prompt.messages(problem.text)) for problem in problems]
        engine = llm.engine_for(prompts, params.max_tokens)
        engine.generate(prompts[:1], replace(params, max_tokens=2, n=engine.num_slots))  # compiles, captures graphs
        solvers[name] = partial(solve, llm=llm)
        if name in vllm:
            texts = [problem.text for problem in problems]
            solvers[_under_vllm(name)] = stack.enter_context(vllm_solver(llm, texts, prompt, params, slots))
    return solvers
