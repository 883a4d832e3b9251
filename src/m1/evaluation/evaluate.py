"""Samples a model on a task, grades every sample and measures what it cost.

    OUT/samples.jsonl  every sample: problem, round, text, answer, grade, tokens, seconds
    OUT/result.json    the metrics, written last

Sampling goes in rounds, one sample of every problem a round, so that the votes of 1, 2, ... n samples have a measured
number of seconds each. Samples are written as they finish; a run that was cut off makes only what is missing.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine import Completion, Engine, SamplingParams, max_len_for, stop_tokens
from m1.errors import UserError
from m1.evaluation.metrics import majority_at_k, pass_at_1, pass_at_k
from m1.evaluation.tasks import Problem
from m1.jsonl import append_jsonl, drop_torn_line, read_json, read_jsonl, write_json
from m1.model.configuration import cache_bytes
from m1.reasoning.answers import Grader, extract_answer
from m1.reasoning.solve import chat_prompt

CONTEXT_FOR_CACHE = 4096


@dataclass(frozen=True)
class Settings:
    """What a result depends on beside model and problems; kept in result.json and checked when a run goes on."""

    task: str
    n: int
    max_new_tokens: int
    temperature: float
    seed: int


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: Settings,
    out: str | Path,
    max_batch: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns what it writes to OUT/result.json.

    Raises:
        UserError: a prompt too long for the model, or OUT holding samples made with other settings or problems.
    """
    if settings.n < 1:
        raise UserError(f"n={settings.n}: need at least one sample a problem")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    samples_path = out / "samples.jsonl"
    _check_settings(out / "settings.json", settings, problems, model)
    drop_torn_line(samples_path)
    rows = list(read_jsonl(samples_path)) if samples_path.exists() else []
    prompts = {p.id: chat_prompt(tokenizer, p.prompt) for p in problems}
    max_len = max_len_for(model, prompts.values(), settings.max_new_tokens)
    engine = Engine(model, stop_tokens(model, tokenizer), max_batch, max_len)
    total = settings.n * len(problems)
    on_progress(len(rows), total)
    with Grader() as grader:
        for round_ in range(settings.n):
            done = {row["problem"]: row for row in rows if row["round"] == round_}
            missing = [p for p in problems if p.id not in done]
            before = max((row["seconds"] for row in done.values()), default=0.0)
            if missing:
                rows += _sample_round(
                    engine, tokenizer, missing, prompts, settings, round_, before, grader, samples_path,
                    partial(_advance, on_progress, len(rows), total),
                )  # fmt: skip
        result = summarize(rows, problems, settings, grader) | model_facts(model)
        result["grading"] = dict(grader.counts)
    write_json(out / "result.json", result)
    return result


def summarize(
    rows: list[dict[str, Any]], problems: list[Problem], settings: Settings, grader: Grader
) -> dict[str, Any]:
    """Metrics of complete samples: n rows a problem."""
    rows = sorted(rows, key=lambda row: row["round"])
    by_problem: dict[str, list[dict]] = {p.id: [] for p in problems}
    for row in rows:
        by_problem[row["problem"]].append(row)
    groups = list(by_problem.values())
    golds = [p.answers for p in problems]
    answers = [[row["answer"] for row in group] for group in groups]
    correct = [[row["correct"] for row in group] for group in groups]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < settings.n] + [settings.n]
    round_seconds = [max(row["seconds"] for row in rows if row["round"] == r) for r in range(settings.n)]
    tokens = sum(row["tokens"] for row in rows)
    first = pass_at_1(correct)
    curve = []
    for k in range(1, settings.n + 1):  # the votes as they stood after k rounds: no resampling, measured seconds
        accuracy = majority_at_k([group[:k] for group in answers], golds, k, grader)
        curve.append(
            {"samples": k, "seconds": sum(round_seconds[:k]), "accuracy": accuracy.value, "ci95": accuracy.ci95}
        )
    return {
        "settings": dataclasses.asdict(settings),
        "n_problems": len(problems),
        "pass@1": first.value,
        "pass@1_ci95": first.ci95,
        "pass@k": {str(k): pass_at_k(correct, k).value for k in ks},
        "maj@k": {str(k): dataclasses.asdict(majority_at_k(answers, golds, k, grader)) for k in ks},
        "accuracy_against_seconds": curve,
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "no_answer": sum(row["answer"] is None for row in rows) / len(rows),
        "tokens": tokens,
        "seconds": sum(round_seconds),
        "tokens_per_second": tokens / sum(round_seconds),
    }


def _advance(on_progress: Callable[[int, int], None], before: int, total: int, made: int) -> None:
    on_progress(before + made, total)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    element = next(model.parameters()).element_size()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "cache_bytes_per_sequence_at_4k": cache_bytes(model.config, CONTEXT_FOR_CACHE, element),
    }


def _sample_round(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    prompts: dict[str, list[int]],
    settings: Settings,
    round_: int,
    seconds_before: float,
    grader: Grader,
    path: Path,
    on_sample: Callable[[int], None],
) -> list[dict[str, Any]]:
    """One sample of each problem. `seconds` is generation time since the round began; grading stops that clock."""
    rows: list[dict[str, Any]] = []
    paused = 0.0
    started = time.monotonic()

    def finished(completion: Completion) -> None:
        nonlocal paused
        now = time.monotonic()
        problem = problems[completion.prompt]
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        answer = extract_answer(text)
        row = {
            "problem": problem.id,
            "round": round_,
            "text": text,
            "answer": answer,
            "correct": answer is not None and grader.grade(answer, problem.answers),
            "tokens": len(completion.token_ids),
            "logprob": sum(completion.logprobs),
            "finish_reason": completion.finish_reason,
            "seconds": round(seconds_before + now - started - paused, 4),
        }
        rows.append(row)
        append_jsonl(path, [row])
        on_sample(len(rows))
        paused += time.monotonic() - now

    params = SamplingParams(
        max_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed * 1_000_003 + round_,
    )
    started = time.monotonic()
    engine.generate([prompts[p.id] for p in problems], params, on_finish=finished)
    return rows


def _check_settings(path: Path, settings: Settings, problems: list[Problem], model: PreTrainedModel) -> None:
    """A folder holds the samples of one model, setting and set of problems: others would be mixed into its metrics."""
    asked = json.dumps([dataclasses.astuple(p) for p in problems]).encode()
    current = {
        **dataclasses.asdict(settings),
        "problems": hashlib.sha256(asked).hexdigest(),
        "model": weights_hash(model),
    }
    if path.exists():
        stored = read_json(path)
        for key, value in current.items():
            if stored.get(key) != value:
                what = f"other {key}" if key in ("problems", "model") else f"{key}={stored.get(key)}"
                raise UserError(f"{path.parent} holds samples made with {what}: choose another --out or delete it")
    write_json(path, current)


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 of all parameters' bytes."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
