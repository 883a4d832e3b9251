"""Prints everything that the command line shows.

Text from users, models and servers is printed plainly: without markup, control characters or secrets.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from m1.evaluation.intervals import percent
from m1.progress import OnProgress
from m1.recipe import Stage
from m1.secrets import redact
from m1.text import clean

if TYPE_CHECKING:  # they import torch
    from numpy import ndarray

    from m1.evaluation.vllm_parity import Compared
    from m1.history import PastRun
    from m1.model.summary import Summary
    from m1.reasoning.budget import Budget
    from m1.reasoning.solution import Solution
    from m1.train.plan import StagePlan

REDRAW_SECONDS = 0.1
BAR_WIDTH = 40
LENGTH_BINS = 12  # of a histogram of rows' lengths
Row = dict[str, Any]  # a row of a benchmark's result
WIDTH = 180  # characters of a benchmark's table in a file or a pipe
MOST_ANSWERS = 10  # maximum number of answers drawn during a vote

console = Console(markup=False, highlight=False)
errors = Console(stderr=True, markup=False, highlight=False)


def line(text: str, style: str | None = None, to: Console | None = None) -> None:
    """Prints one line, without wrapping it on a narrow terminal."""
    (to or console).print(clean(text), style=style, soft_wrap=True)


def error(message: object) -> None:
    """Prints the one-line message for bad input."""
    line(f"m1: {' '.join(str(message).split())}", "red", errors)


def warning(message: object) -> None:
    """Prints the one-line message of a warning."""
    line(f"m1: {' '.join(str(message).split())}", "yellow", errors)


def usage_error(problem: Any) -> None:
    """Prints one line about a command line that can't be parsed, or the help if it has no arguments."""
    if type(problem).__name__ == "NoArgsIsHelpError":
        problem.show()
    else:
        command = problem.ctx.command_path if problem.ctx else "m1"
        error(f"{problem.format_message().rstrip('.')} (see `{command} --help`)")


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[OnProgress]:
    """Shows a progress bar on stderr. Yields `on_progress(done, total)`, which moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    formats = (clean(text).replace("{", "{{").replace("}", "}}") for text in (what, unit))
    name, counted = (TextColumn(format_, markup=False) for format_ in formats)
    with Progress(name, BarColumn(), MofNCompleteColumn(), counted, TimeElapsedColumn(), console=errors) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def stage_begins(pipeline: str, stage: str, number: int, count: int, finished: bool) -> None:
    """Prints a rule before a stage of a pipeline, with the number of stages before it."""
    which = f"stage {number + 1} of {count}: {stage}" if number < count else stage
    errors.rule(Text(clean(f"{pipeline} {'█' * number}{'░' * (count - number)} {which}")))
    if finished:
        line("finished already", to=errors)


def stage_result(stage: Stage, result: Any) -> None:
    """Prints the accuracy of each model after an eval stage of a pipeline. Other stages print nothing."""
    if stage.kind == "eval":
        for name, measured in result.items():
            n = measured["settings"]["n"]
            accuracy = f"pass@1 {percent(measured['pass@1'], measured['pass@1_ci95'])}"
            line(f"{name}: {accuracy}, maj@{n} {percent(**measured['maj@k'][str(n)])}", to=errors)


def plan(stages: "Iterable[StagePlan]", title: str) -> None:
    """Prints what a recipe's training stages take on these GPUs, and then the parts of their memory."""
    numbers = ("parameters", "GiB per GPU", "rows x passes", "steps", "tokens", "hours")
    table = Table("stage", *(Column(name, justify="right") for name in numbers), title=title)
    parts, hours = [], 0.0
    for stage in stages:
        hours += stage.hours or 0.0
        counted = ["?", "?", "?"]
        if stage.steps is not None and stage.tokens is not None and stage.hours is not None:
            counted = [f"{stage.steps:,}", f"{stage.tokens / 1e9:.3g} B", f"{stage.hours:.3g}"]
        memory = {part: size / 2**30 for part, size in stage.memory.items()}
        table.add_row(
            stage.name,
            f"{stage.parameters / 1e9:.3f} B",
            f"{sum(memory.values()):.1f}",
            f"{stage.rows[0]} x {stage.rows[1]}",
            *counted,
        )
        parts.append(f"{stage.name}, GiB: " + ", ".join(f"{part} {size:.1f}" for part, size in memory.items()))
    console.print(table)
    for text in parts:
        line(text)
    line(f"{hours:.3g} hours together, computed and not measured; ?: only the data tells")


def json_data(data: Any) -> None:
    """Prints an object as indented JSON."""
    console.print_json(redact(json.dumps(data)))


def conversion(out: str, layers: int, kept: list[int]) -> None:
    """Prints which layers of a converted model stayed attention."""
    line(f"{out}: {len(kept)} attention layers {kept}, {layers - len(kept)} Mamba layers")


def ranking(result: dict[str, Any], out: str) -> None:
    """Prints the cost of replacing each layer, most costly first."""
    for place, layer in enumerate(result["ranking"], start=1):
        line(f"{place:3d}. layer {layer:3d}  {result['kl'][str(layer)]:.4f} nats per token")
    line(f"{result['tokens']} tokens; written to {out}")


def lengths(lengths: "ndarray") -> None:
    """Draws a histogram of rows' lengths in tokens."""
    import numpy as np

    if not len(lengths):
        return
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, LENGTH_BINS + 1).astype(int))
    counts = np.histogram(lengths, edges)[0]
    for first, end, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR_WIDTH * count / counts.max())
        line(f"{first:>9,} to {end - 1:>9,} tokens {count:>11,} rows  {bar}")


def evaluation(task: str, result: dict[str, Any], out: Path) -> None:
    """Prints the accuracies and the speed of an evaluation, and how many grades are in doubt."""
    n = result["settings"]["n"]
    line(f"{task}: {result['n_problems']} problems, {n} samples each")
    line(f"pass@1 {percent(result['pass@1'], result['pass@1_ci95'])}")
    line(f"maj@{n} {percent(**result['maj@k'][str(n)])}")
    speed = f"{result['tokens_per_second']:,.0f} tokens/s, " if result["tokens_per_second"] is not None else ""
    line(f"{speed}written to {out / 'result.json'}")
    if undecided := sum(count for name, count in result["grading"].items() if name != "graded"):
        line(f"{undecided} comparisons of answers couldn't be decided and count as unequal", "yellow")
    if doubted := len(result["audit"]["disagreements"]):
        line(f"a second grader doubts {doubted} grades: see `audit` in result.json", "yellow")


def comparison(compared: dict[str, Any]) -> None:
    """Prints a comparison's table, the settings that differ, the most different problems, and a last line of JSON."""
    table = Table(title=f"{compared['problems']} problems; in %, differences with their 95 % intervals")
    for column in ("", "A", "B", "B - A", "from", "to", "p"):
        table.add_column(column, justify="right" if column else "left")
    for name, m in compared["measures"].items():
        numbers = (m["a"], m["b"], m["difference"], *m["ci95"])
        table.add_row(name, *(f"{100 * number:.1f}" for number in numbers), f"{m['p']:.4f}")
    console.print(table)
    line(f"A = {compared['a']}")
    line(f"B = {compared['b']}")
    for name, (left, right) in compared["settings_that_differ"].items():
        line(f"different setting: {name} is {left!r} in A and {right!r} in B")
    for row in compared["most_different"]:
        line(f"{100 * row['a']:5.1f} -> {100 * row['b']:5.1f} %  {row['problem']}")
    line(json.dumps(compared))


def parity(compared: "Sequence[Compared]", tolerance: float) -> bool:
    """Prints how vLLM's samples compare with the model's, and a last line of JSON. Returns whether all agree."""
    table = Table(title=f"vLLM's samples; log-probabilities may differ by {tolerance:g}")
    for column in ("prompt", "tokens", "equal", "difference", "missed", ""):
        table.add_column(column, justify="right")
    agree = [sample.agrees(tolerance) for sample in compared]
    for i, (sample, fine) in enumerate(zip(compared, agree, strict=True)):
        numbers = (str(sample.equal), f"{sample.difference:.1e}", f"{sample.missed:.1e}")
        table.add_row(str(i), str(sample.tokens), *numbers, "" if fine else "differs")
    console.print(table)
    result = {
        "agree": all(agree),
        "tolerance": tolerance,
        "tokens": sum(sample.tokens for sample in compared),
        "equal": sum(sample.equal for sample in compared),
        "largest_difference": max(sample.difference for sample in compared),
    }
    line(json.dumps(result))
    return all(agree)


def budgets(result: dict[str, Any], out: str) -> None:
    """Prints each model's accuracy at the longest budget, and the leads over the first model."""
    for name, measured in result["models"].items():
        last = measured["points"][-1]
        accuracy = f"{percent(last['accuracy'], last['ci95'])} at {last['seconds']:g} s"
        samples, speed = last["samples"], measured["tokens_per_second"]
        line(f"{name}: {accuracy}, {samples:.1f} samples per problem, {speed:,.0f} tokens/s")
    first = next(iter(result["models"]))
    for name, lead in result["leads"].items():
        value, low, high = (f"{100 * number:+.1f}" for number in (lead["value"], *lead["ci95"]))
        line(f"{name} is right {value} points [{low}, {high}] more often than {first}, averaged over the budgets")
    line(f"written to {Path(out, 'budget.json')} and budget.png")


def runs(found: Sequence["PastRun"], folder: Path) -> None:
    """Prints the table of `m1 runs`."""
    if not found:
        return line(f"no runs in {folder}")
    table = Table("run", "stage", "state", *_right("steps", "loss"), "when")
    for run in found:
        total = f" of {run.max_steps:,}" if run.max_steps and run.max_steps > 0 else ""
        steps = "" if run.step is None else f"{run.step:,}{total}"
        loss = "" if run.loss is None else f"{run.loss:.4g}"
        table.add_row(clean(str(run.path)), clean(run.stage), run.state, steps, loss, f"{run.when:%Y-%m-%d %H:%M}")
    console.print(table, width=None if console.is_terminal else WIDTH)


def generated(tokens: int, seconds: float, out: str) -> None:
    """Prints the number of generated tokens and the speed."""
    line(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s, written to {out}")


def interactive() -> bool:
    """Whether someone types at a terminal."""
    return sys.stdin.isatty() and console.is_terminal


def questions() -> Iterator[str]:
    """Yields the lines of the input that aren't empty, after a prompt on a terminal. Ctrl-C and Ctrl-D end it.

    Bytes that aren't text become replacement characters.
    """
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a text file, whatever its type says
    while True:
        try:
            text = (console.input("> ") if interactive() else input()).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text:
            yield text


def stream(pieces: Iterable[str]) -> None:
    """Prints pieces of a text as they come. Ctrl-C ends them, and nothing else."""
    try:
        for piece in pieces:
            console.print(clean(piece), end="", soft_wrap=True)
    except KeyboardInterrupt:
        pass
    finally:
        console.print()


@contextmanager
def watch_vote(budget: "Budget") -> Iterator[Callable[["Solution"], None]]:
    """Yields `solve`'s `on_step`, which draws the vote on a terminal. The drawing is removed at the end.

    Without a terminal, nothing is drawn.
    """
    if not console.is_terminal:
        yield lambda solution: None
        return
    from rich.live import Live

    drawn = -math.inf
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def on_step(solution: "Solution") -> None:
            nonlocal drawn
            if solution.seconds - drawn >= REDRAW_SECONDS:
                drawn = solution.seconds
                live.update(vote_picture(solution, budget), refresh=True)

        yield on_step


def vote_picture(solution: "Solution", budget: "Budget") -> Group:
    """The vote as a picture: the cost so far, and one bar per answer."""
    from rich.progress_bar import ProgressBar

    rate = solution.tokens / max(solution.seconds, 1e-9)
    of = "" if budget.n is None else f" of {budget.n}"
    status = f"{len(solution.samples)}{of} samples, {solution.tokens:,} tokens, {rate:,.0f} tokens/s"
    if budget.seconds is not None:
        status += f", {max(0.0, budget.seconds - solution.seconds):.1f} s left"
    bars = Table.grid(padding=(0, 1))
    whole = math.fsum(solution.vote.weights.values()) or 1.0
    for answer, votes in list(solution.vote.counts.items())[:MOST_ANSWERS]:
        bar = ProgressBar(total=whole, completed=solution.vote.weights[answer], width=BAR_WIDTH)
        bars.add_row(Text(str(votes), justify="right"), bar, Text(clean(answer), overflow="ellipsis", no_wrap=True))
    return Group(Text(status), bars)


def solution(solved: "Solution") -> None:
    """Prints the tally, the cost and the answer. The tally shows weights that differ from the numbers of votes."""
    for answer, votes in solved.vote.counts.items():
        weight = solved.vote.weights[answer]
        line(f"{votes:4d}  {answer}" if weight == votes else f"{votes:4d}  {weight:8.3f}  {answer}")
    if solved.vote.abstained:
        line(f"{solved.vote.abstained:4d}  (no answer)")
    begun = len(solved.samples) + solved.aborted
    spent = f"{solved.tokens} tokens, {solved.seconds:.2f} s"
    line(f"{len(solved.samples)} of {begun} samples finished, {spent}, stopped: {solved.reason}")
    line(f"answer: {solved.answer}")


def model_summary(summary: "Summary") -> None:
    """Prints a model's layers with their parameters and caches, and its cache compared with its teacher's."""
    table = Table("layer", "kind", *_right("mixer parameters", "MLP and norms", f"cache at {summary.context:,} tokens"))
    for i, layer in enumerate(summary.layers):
        cells = (f"{layer.mixer_parameters:,}", f"{layer.mlp_parameters:,}", human_bytes(layer.cache_bytes))
        table.add_row(str(i), layer.kind, *cells)
    outside = summary.parameters - sum(layer.mixer_parameters + layer.mlp_parameters for layer in summary.layers)
    tied = " (tied)" if summary.config.tie_word_embeddings else ""
    table.add_section()
    table.add_row("", f"embedding, head{tied}", "", f"{outside:,}", "")
    total = human_bytes(summary.cache_bytes(summary.context))
    table.add_row("", "total", "", f"{summary.parameters:,}", total, style="bold")
    console.print(table)
    size = human_bytes(summary.parameters * summary.dtype.itemsize)
    dtype = str(summary.dtype).removeprefix("torch.")
    more = summary.parameters / summary.teacher_parameters - 1
    line(f"{size} of weights in {dtype}; {100 * more:+.1f} % parameters compared with attention in every layer")
    table = Table(*_right("context", "cache", "attention everywhere", "ratio"), title="cache of one sequence")
    for context in summary.contexts(1024, 4):
        ours, teachers = summary.cache_bytes(context), summary.teacher_cache_bytes(context)
        table.add_row(f"{context:,}", human_bytes(ours), human_bytes(teachers), f"{ours / teachers:.3f}")
    console.print(table)
    if summary.break_even is not None:
        line(f"the cache is smaller from {summary.break_even:,} tokens on")


def show_time(row: Row) -> str:
    """The median, the fastest and the slowest call, in a unit that fits: "3.21 ms (3.10..3.52)"."""
    units = (("s", 1.0), ("ms", 1e3))
    unit, scale = next(((unit, scale) for unit, scale in units if row["seconds"] * scale >= 1), ("µs", 1e6))
    median, fastest, slowest = (scale * row[key] for key in ("seconds", "seconds_min", "seconds_max"))
    return f"{median:.3g} {unit} ({fastest:.3g}..{slowest:.3g})"


def show_memory(row: Row) -> str:
    """Peak memory per token if the row counts tokens, else in total."""
    if "tokens" in row:
        return f"{row['peak_memory_bytes'] / row['tokens'] / 1024:,.1f} KiB/token"
    return f"{row['peak_memory_bytes'] / 2**30:,.1f} GiB"


def show_cell(row: Row, key: str, show: str | Callable[[Row], str]) -> str:
    """One cell of the table, empty if the row has no such key."""
    if key not in row:
        return ""
    return show.format_map(row) if isinstance(show, str) else show(row)


# Heading, the key that a row needs for it, and how to show the row: a format or a function.
# A column that no row has a value for is left out.
COLUMNS: list[tuple[str, str, str | Callable[[Row], str]]] = [
    ("pass", "pass", "{pass}"),
    ("", "name", "{name}"),
    ("job", "job", "{job}"),
    ("batch", "batch", "{batch}"),
    ("chats", "chats", "{chats}"),
    ("new tokens", "new_tokens", "{new_tokens:,}"),
    ("tokens/s", "tokens_per_second", "{tokens_per_second:,.0f}"),
    ("of floor", "share_of_floor", "{share_of_floor:.0%}"),
    ("times vLLM", "times_vllm", "{times_vllm:.2f}"),
    ("times vLLM hybrid", "times_vllm-hybrid", "{times_vllm-hybrid:.2f}"),
    ("times llama.cpp", "times_llama_cpp", "{times_llama_cpp:.2f}"),
    ("times transformer", "times_ours-transformer", "{times_ours-transformer:.2f}"),
    ("prefill", "prefill_seconds", "{prefill_seconds:.3g} s"),
    ("first token", "first_token_seconds", "{first_token_seconds:.3g} s"),
    ("times vLLM", "prefill_times_vllm", "{prefill_times_vllm:.2f}"),
    ("start", "start_seconds", "{start_seconds:.2f} s"),
    ("prompt tokens", "prompt_tokens", "{prompt_tokens:,}"),
    ("together", "together", "{together}"),
    ("largest batch", "largest_batch", "{largest_batch}"),
    ("time", "seconds", show_time),
    ("runs", "runs", "{runs}"),
    ("tokens", "tokens", "{tokens:,}"),
    ("µs/token·layer", "microseconds_per_token", "{microseconds_per_token:.3g}"),
    ("GB/s", "gigabytes_per_second", "{gigabytes_per_second:.3g} ({share_of_copy:.0%})"),
    ("GFLOP/s", "gigaflops_per_second", "{gigaflops_per_second:.3g} ({share_of_gemm:.1%})"),
    ("time/ours", "ratio_to_ours", "{ratio_to_ours:.3g}"),
    ("memory", "peak_memory_bytes", show_memory),
    ("error", "error", "{error:.0e}"),
]


def benchmark(result: dict[str, Any], path: Path | None) -> None:
    """Prints a benchmark's table, the limits that its shares refer to, failures, omissions, and a last line of JSON."""
    rows, machine, limits = result["rows"], result["machine"], result["limits"]
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    table = Table(*(heading for heading, *_ in columns))
    for row in rows:
        table.add_row(*(show_cell(row, key, show) for _, key, show in columns))
    console.print(table, width=None if console.is_terminal else WIDTH)
    line(
        f"Shares are of this machine's limits ({machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, "
        f"{machine['isa']}), measured in the same run: copies {limits['copy_bytes_per_second'] / 1e9:,.1f} GB/s, "
        f"matrix products {limits['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s."
    )
    for row in rows:
        if "failure" in row:
            line(f"{row['name']}: {row['failure']}")
    for skipped in result["skipped"]:
        line(f"left out: {skipped}")
    if path:
        line(f"written to {path}")
    line(json.dumps(result, allow_nan=False))


def human_bytes(size: float) -> str:
    """A number of bytes in a unit that fits: "1.5 MiB"."""
    if size < 1024:
        return f"{size:,.0f} B"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if round(size, 1) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:,.1f} GiB"


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
