"""Finds training problems that are in a benchmark (decontamination).

Two texts overlap if they have NGRAM words in a row in common, or if they are equal and shorter. Words are runs of
letters and runs of digits: case, spaces, punctuation and LaTeX's braces don't count.
"""

import re
from collections.abc import Iterable

from m1.tasks.benchmarks import HUB, load_task

NGRAM = 13  # words, as for GPT-3 (arXiv 2005.14165, appendix C)
WORD = re.compile(r"[^\W\d_]+|\d+")


class Overlap:
    """Tells whether a text overlaps with any of these problems."""

    def __init__(self, problems: Iterable[str]):
        self._known = {gram for problem in problems for gram in _ngrams(problem)}

    @classmethod
    def of(cls, benchmarks: Iterable[str]) -> "Overlap":
        """With the problems of benchmarks: "gsm8k", files or data sets. Raises UserError as `load_task`."""
        tasks = [load_task(name, None) if name in HUB else load_task("benchmark", name) for name in benchmarks]
        return cls(problem.text for task in tasks for problem in task)

    def __call__(self, text: str) -> bool:
        """Whether the text overlaps with one of the problems."""
        return bool(self._known) and not self._known.isdisjoint(_ngrams(text))


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = tuple(WORD.findall(text.casefold()))
    return {words[i : i + NGRAM] for i in range(max(len(words) - NGRAM, 0) + 1)}
