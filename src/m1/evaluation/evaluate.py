"""Samples a task, grades every sample and measures what it cost.

    OUT/settings.json    what the samples depend on: those of other settings are not mixed in
    OUT/problems.jsonl   the problems and golds
    OUT/samples.jsonl    every sample as it finishes: problem, round, text, answer, grade, tokens, seconds
    OUT/samples.parquet  the same, written at the end, where there is pyarrow
    OUT/result.json      the metrics, written last

A run that was cut off makes only what is missing. What its grading met is in the samples, its seconds too: both go on
from there. The result's `grading` is the samples' and the votes' of the session that finished; sessions don't know each
other's pairs, so some are counted twice.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from m1.engine import SamplingParams, fold_in
from m1.errors import UserError
from m1.evaluation.folder import SETTINGS, refuse_other_settings
from m1.evaluation.generators import Ask, Generator, Sample
from m1.evaluation.metrics import summarize
from m1.evaluation.tasks import Problem
from m1.jsonl import append_jsonl, drop_torn_line, read_jsonl, write_json
from m1.reasoning.answers import Grader, extract_answer
from m1.reasoning.audit import audit

TOO_LONG_TO_SHOW = {
    "problems_sha256": "other problems",
    "prompt_template": "another prompt template",
    "model": "another model",
}
DOUBTED = ("problem", "round", "answer", "golds", "correct")  # what is told of a grade that the audit doubts


@dataclass(frozen=True)
class Settings:
    """What a result depends on beside model and problems.

    `prompt_template` becomes a user's message, with the problem's text in the place of {problem}.
    """

    task: str
    n: int
    max_new_tokens: int
    temperature: float
    seed: int
    prompt_template: str = "{problem}"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n={self.n}: need at least one sample a problem")
        self.params()

    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_new_tokens, temperature=self.temperature)


def evaluate(
    generator: Generator,
    problems: list[Problem],
    settings: Settings,
    out: str | Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns what it writes to OUT/result.json.

    Raises:
        UserError: a prompt too long for the model, a server that fails, or an OUT that can't be written or holds
            samples made with other settings or problems.
    """
    out = Path(out)
    identity = generator.identity()
    _prepare(out, asdict(settings) | identity, problems)
    rows = _finished_rows(out / "samples.jsonl")
    total = settings.n * len(problems)
    on_progress(len(rows), total)
    golds = {p.id: p.answers for p in problems}
    step = 1 if generator.by_round else settings.n
    with Grader() as grader:
        for first in range(0, settings.n, step):
            asks = list(_missing(problems, settings, range(first, first + step), rows))
            if not asks:
                continue
            before = max((row["seconds"] for row in rows.values()), default=0.0)
            with closing(generator.generate(asks, settings.params())) as samples:
                for sample in samples:
                    row = _graded(replace(sample, seconds=round(before + sample.seconds, 4)), golds, grader)
                    append_jsonl(out / "samples.jsonl", [row])
                    rows[sample.problem, sample.round] = row
                    on_progress(len(rows), total)
        before_votes = Counter(grader.counts)
        result = summarize(list(rows.values()), golds, settings.n, grader, generator.by_round)
    checked = audit({**row, "golds": golds[row["problem"]]} for row in rows.values())
    result = {
        "settings": asdict(settings),
        "prompt_template_sha256": hashlib.sha256(settings.prompt_template.encode()).hexdigest(),
        "problems_sha256": _problems_hash(problems),
        **identity,
        **generator.facts(),
        **result,
        "audit": {
            "agreed": checked.agreed,
            "disagreements": [{key: row[key] for key in DOUBTED} for row in checked.disagreements],
        },
        "grading": _sum([*(row["grading"] for row in rows.values()), _difference(grader.counts, before_votes)]),
    }
    _write_parquet(out / "samples.parquet", list(rows.values()))
    write_json(out / "result.json", result)
    return result


def _prepare(out: Path, current: dict[str, Any], problems: list[Problem]) -> None:
    """Makes OUT. Samples it holds must be of the same settings and problems: others would be mixed into the metrics."""
    current = {**current, "problems_sha256": _problems_hash(problems)}
    path, samples = out / SETTINGS, out / "samples.jsonl"
    if path.exists() and samples.exists() and samples.stat().st_size:
        refuse_other_settings(out, current, "samples", TOO_LONG_TO_SHOW)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "problems.jsonl").unlink(missing_ok=True)
        append_jsonl(out / "problems.jsonl", [asdict(p) for p in problems])
        write_json(path, current)
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from None


def _problems_hash(problems: list[Problem]) -> str:
    return hashlib.sha256(json.dumps([astuple(p) for p in problems]).encode()).hexdigest()


def _finished_rows(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Samples by problem and round. Two runs at a time may have made one twice: the first stands."""
    drop_torn_line(path)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read_jsonl(path) if path.exists() else ():
        rows.setdefault((row["problem"], row["round"]), row)
    return rows


def _missing(
    problems: list[Problem], settings: Settings, rounds: range, rows: dict[tuple[str, int], dict[str, Any]]
) -> Iterator[Ask]:
    """What is left to sample in these rounds. Seeds don't depend on how far an earlier run came."""
    for i, problem in enumerate(problems):
        if missing := tuple(r for r in rounds if (problem.id, r) not in rows):
            prompt = settings.prompt_template.replace("{problem}", problem.text)
            yield Ask(problem.id, prompt, missing, fold_in(settings.seed * 1_000_003 + missing[0], i))


def _graded(sample: Sample, golds: dict[str, tuple[str, ...]], grader: Grader) -> dict[str, Any]:
    """The sample's row. `grading` is what its grade added to the grader's counts."""
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
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:  # the JSONL has it all
        return
    draft = path.with_name(path.name + ".part")
    parquet.write_table(pyarrow.Table.from_pylist(rows), draft)
    draft.replace(path)
