"""The vote while it goes on: a bar an answer, and what has been spent."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from m1.reasoning.budget import Budget
from m1.reasoning.solution import Solution

REDRAW_SECONDS = 0.1
BAR_WIDTH = 40
MOST_ANSWERS = 10


@contextmanager
def watch(console: Console, budget: Budget) -> Iterator[Callable[[Solution], None]]:
    """`solve`'s on_step for a console: draws on a terminal, which is clean again afterwards, and else does nothing."""
    if not console.is_terminal:
        yield lambda solution: None
        return
    drawn = -math.inf
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def on_step(solution: Solution) -> None:
            nonlocal drawn
            if solution.seconds - drawn >= REDRAW_SECONDS:
                drawn = solution.seconds
                live.update(picture(solution, budget), refresh=True)

        yield on_step


def picture(solution: Solution, budget: Budget) -> Group:
    rate = solution.tokens / max(solution.seconds, 1e-9)
    of = "" if budget.n is None else f" of {budget.n}"
    status = f"{len(solution.samples)}{of} samples, {solution.tokens:,} tokens, {rate:,.0f} tokens/s"
    if budget.seconds is not None:
        status += f", {max(0.0, budget.seconds - solution.seconds):.1f} s left"
    bars = Table.grid(padding=(0, 1))
    whole = math.fsum(solution.vote.weights.values()) or 1.0
    for answer, votes in list(solution.vote.counts.items())[:MOST_ANSWERS]:
        bar = ProgressBar(total=whole, completed=solution.vote.weights[answer], width=BAR_WIDTH)
        bars.add_row(Text(str(votes), justify="right"), bar, Text(answer, overflow="ellipsis", no_wrap=True))
    return Group(Text(status), bars)


def summary(solution: Solution) -> list[str]:
    """The final lines: the tally (with weights where they aren't the votes), what was spent, and the answer."""
    lines = []
    for answer, votes in solution.vote.counts.items():
        weight = solution.vote.weights[answer]
        lines.append(f"{votes:4d}  {answer}" if weight == votes else f"{votes:4d}  {weight:8.3f}  {answer}")
    if solution.vote.abstained:
        lines.append(f"{solution.vote.abstained:4d}  (no answer)")
    begun = len(solution.samples) + solution.aborted
    lines.append(
        f"{len(solution.samples)} of {begun} samples finished, {solution.tokens} tokens, {solution.seconds:.2f} s, "
        f"stopped: {solution.reason}"
    )
    return [*lines, f"answer: {solution.answer}"]
