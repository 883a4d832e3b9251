"""Samples a task, grades every sample, and measures accuracy and cost.

    OUT/settings.json    what the samples depend on (runs.py)
    OUT/problems.jsonl   the problems and golds
    OUT/samples.jsonl    every sample as it finishes: problem, round, text, answer, grade, tokens, seconds
    OUT/result.json      the metrics
    OUT/samples.parquet  the samples as a table; written last, and if it can't be, only a warning is logged

All samples are asked for at once: the batch stays full, and a prompt is prefilled once for all of its samples. With
`by_round`, every problem is sampled once before any is sampled twice. A sample's seed depends only on the run's seed,
the problem's number and the sample's.

An interrupted run resumes with the missing samples. Seconds and grading counts are stored with the samples, so a
resumed run continues them. The result's `grading` sums the counts of the samples and of the final votes. A session
doesn't know the pairs of answers that earlier ones compared, so some pairs are counted twice.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

from m1.engine import SamplingParams, fold_in
from m1.engine.data_parallel import devices_of, load_llm
from m1.errors import UserError
from m1.evaluation.metrics import metrics_of
from m1.evaluation.samplers import EngineSampler, Sample, Sampler, SampleRequest, TransformersSampler
from m1.evaluation.shards import WHOLE, Shard
from m1.grading import Grader, extract_answer
from m1.grading.audit import audit
from m1.jsonl import as_written, to_jsonl, write_json, write_text
from m1.model.checkpoint import load_model
from m1.progress import OnProgress, Progress, ignore, silent
from m1.recipe import EvalSettings, EvalStage
from m1.runs import Run, versions
from m1.tasks.benchmarks import load_task
from m1.tasks.problem import Problem, problems_hash
from m1.tasks.prompts import ProblemPrompt

logger = logging.getLogger(__name__)

# What a line of samples.jsonl holds.
ROW = get_type_hints(Sample) | {"answer": str | None, "correct": bool, "grading": dict[str, int]}
DOUBTED = ("problem", "round", "answer", "golds", "correct")  # shown of samples whose grade is doubted


def run(stage: EvalStage, force: bool = False, progress: Progress = silent) -> dict[str, dict[str, Any]]:
    """Runs the eval stage of a recipe. Returns one result per model; a model's folder is OUT/NAME."""
    problems = load_problems(stage)
    results = {}
    with Run(stage.kind, stage.out, stage.settings(), force=force) as whole:
        for name, folder in stage.models.items():
            with local_sampler(stage, folder) as sampler, progress(name, "samples") as on_progress:
                results[name] = evaluate(sampler, problems, stage, Path(stage.out, name), on_progress)
        whole.finish()
    return results


@contextmanager
def local_sampler(stage: EvalStage, folder: str | Path) -> Iterator[Sampler]:
    """Loads the checkpoint `folder` into the kind of sampler that the stage names, on its devices."""
    dtype, sizes = stage.dtype or "auto", {"max_num_seqs": stage.max_num_seqs, "quantize": stage.quantize}
    if stage.sampler == "engine":
        with load_llm(folder, stage.devices, dtype, **sizes) as llm:
            yield EngineSampler(llm.model, llm.tokenizer, llm=llm, **sizes)
    else:
        device, *others = devices_of(stage.devices)
        if others:
            raise UserError(f"devices {stage.devices}: the sampler {stage.sampler} runs on one device; name one")
        yield TransformersSampler(*load_model(folder, device, dtype=dtype), **sizes)


def load_problems(stage: EvalStage) -> list[Problem]:
    """Loads the stage's problems. Raises UserError as `load_task`."""
    return load_task(stage.task, stage.data, stage.limit, stage, stage.seed, stage)


def evaluate(
    sampler: Sampler,
    problems: Sequence[Problem],
    settings: EvalSettings,
    out: str | Path,
    on_progress: OnProgress = ignore,
    force: bool = False,
    shard: Shard = WHOLE,
) -> dict[str, Any]:
    """Measures a model's accuracy and cost on problems: pass@1, pass@k and maj@k.

    Args:
        sampler: draws the samples, e.g. an `EngineSampler`.
        problems: what to solve.
        settings: task, number of samples, and sampling.
        out: the result folder. An interrupted run in it resumes.
        on_progress: called with the number of finished samples and of all samples.
        force: move `out` aside if it holds something else.
        shard: the share of the problems to sample. `merge` joins the results of all.

    Returns:
        The content of OUT/result.json.

    Raises:
        UserError: a prompt too long for the model, a server that fails, an `out` that can't be written or that was made
            with other settings or problems, or a shard without problems.
    """
    mine = {i: problem for i, problem in enumerate(problems) if shard.has(i)}
    if not mine and problems:
        raise UserError(f"shard {shard}: there are only {len(problems)} problems; give fewer shards")
    prompt = settings.task_prompt()
    params, used, identity = SamplingParams.of(settings), settings.used(EvalSettings, prompt), sampler.identity()
    golds, problems_sha256 = {problem.id: problem.answers for problem in mine.values()}, problems_hash(problems)
    share = {"shard": str(shard)} if shard != WHOLE else {}
    depends = used | identity | {"problems_sha256": problems_sha256} | share
    with Run("eval", out, depends, force=force) as run, Grader() as grader:
        rows = {(row["problem"], row["round"]): row for row in run.read("samples.jsonl", ROW)}
        total = settings.n * len(mine)
        on_progress(len(rows), total)
        step = 1 if settings.by_round else settings.n
        for first in range(0, settings.n, step):
            requests = list(_missing(mine, prompt, settings.seed, range(first, first + step), rows))
            if not requests:
                continue
            before = max((row["seconds"] for row in rows.values()), default=0.0)
            with closing(sampler.generate(requests, params)) as samples:
                for sample in samples:
                    row = _graded(replace(sample, seconds=round(before + sample.seconds, 4)), golds, grader)
                    run.append("samples.jsonl", row)
                    rows[sample.problem, sample.round] = row
                    on_progress(len(rows), total)
        about = {
            "settings": used,
            "prompt_template_sha256": hashlib.sha256(prompt.template.encode()).hexdigest(),
            "problems_sha256": problems_sha256,
            "versions": versions(),
            **identity,
            **share,
            **sampler.facts(),
        }
        return write_result(run, about, problems, list(rows.values()), golds, grader)


def write_result(
    run: Run,
    about: dict[str, Any],
    problems: Sequence[Problem],
    rows: list[dict[str, Any]],
    golds: dict[str, tuple[str, ...]],
    grader: Grader,
) -> dict[str, Any]:
    """Makes the result of all samples, writes everything but samples.jsonl, and finishes the run.

    Args:
        about: the head of the result, with the settings.
        problems: all of them, of which `golds` may have a share.
        rows: of samples.jsonl.
        golds: of the sampled problems, by id.

    Returns:
        The content of result.json.
    """
    before_votes = Counter(grader.counts)
    n, by_round = about["settings"]["n"], about["settings"]["by_round"]
    with as_written(run.folder / "samples.jsonl"):
        metrics = metrics_of(rows, golds, n, grader, by_round)
    checked = audit({**row, "golds": golds[row["problem"]]} for row in rows)
    result = {
        **about,
        **metrics,
        "audit": {
            "agreed": checked.agreed,
            "disagreements": [{key: row[key] for key in DOUBTED} for row in checked.disagreements],
        },
        "grading": _sum([*(row["grading"] for row in rows), _difference(grader.counts, before_votes)]),
    }
    write_text(run.folder / "problems.jsonl", to_jsonl(map(asdict, problems)))
    write_json(run.folder / "result.json", result)
    _write_parquet(run.folder / "samples.parquet", rows)
    run.finish()
    return result


def _missing(
    problems: dict[int, Problem],
    prompt: ProblemPrompt,
    seed: int,
    rounds: range,
    rows: dict[tuple[str, int], dict[str, Any]],
) -> Iterator[SampleRequest]:
    """Requests for the missing samples of these rounds. The problems' keys are their numbers."""
    for i, problem in problems.items():
        if missing := tuple(r for r in rounds if (problem.id, r) not in rows):
            yield SampleRequest(problem.id, prompt.messages(problem.text), missing, fold_in(seed, i))


def _graded(sample: Sample, golds: dict[str, tuple[str, ...]], grader: Grader) -> dict[str, Any]:
    """The row of a sample in samples.jsonl. `grading` is what this sample added to the grader's counts."""
    before = Counter(grader.counts)
    answer = extract_answer(sample.text)
    correct = answer is not None and grader.grade(answer, golds[sample.problem])
    return {**asdict(sample), "answer": answer, "correct": correct, "grading": _difference(grader.counts, before)}


def _difference(after: Counter[str], before: Counter[str]) -> dict[str, int]:
    return {name: count - before[name] for name, count in after.items()}


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the samples as a table, for convenience. If that fails, only a warning is logged."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:  # samples.jsonl has the same rows
        return
    draft = path.with_name(f".{path.name}.part")
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), draft)
        draft.replace(path)
    except Exception as error:  # samples.jsonl has the same rows
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        logger.warning("%s isn't written: %s", path, error)
