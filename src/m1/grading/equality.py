"""Decides the equality of two answers where that needs no algebra, and so no worker process."""

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache

MAX_ANSWER_CHARACTERS = 1000  # longer texts aren't answers, and are compared as texts only

# Spelling that never changes a value. The end of a matrix row keeps its backslashes and loses its spacing [8pt].
SPACING = re.compile(r"(\\\\)(?:\s*\[-?[\d.]+\s*[a-z]{2}\])?|\\!\s*|\\[,;:$]")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?")
NUMBER = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(?:e([+-]?\d{1,4})|\s*(?:\\times|\\cdot|\*|\u00d7)\s*10\^(?:\{\s*([+-]?\d{1,4})\s*\}|(\d)))?",
    re.IGNORECASE,
)
WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
WORDS = re.compile(r"\(?([A-Za-z][A-Za-z '-]*)\)?")
CLOCK = re.compile(r"0?(\d{1,2}:\d\d)(?:([ap])\.?m\.?)?")
NUMERAL = re.compile(r"\d+_(?:\d|\{\d+\})")
TWO_UNITS = re.compile(
    r"\d\s*\\(?:text|textrm|mathrm|mbox)\s*\{(?!\s*(?:and|or)\s*\})[^{}]*[A-Za-z]{2}[^{}]*\}[\s,]*\d"
)


def normalize(answer: str) -> str:
    r"""Removes spelling that never changes a value, so that many equal answers become the same text.

    It removes outer spaces and dollars, a final period, leading zeros, LaTeX spacing such as \, and thousands'
    separators. 7e37 becomes 7 \times 10^{37}.
    """
    return _normalize(answer) if len(answer) <= MAX_ANSWER_CHARACTERS else answer.strip()


@lru_cache(maxsize=100_000)
def _normalize(answer: str) -> str:
    answer = (
        SPACING.sub(lambda m: m.group(1) or "", answer)
        .replace("{,}", ",")
        .replace("\N{MINUS SIGN}", "-")
        .strip()
        .strip("$")
    )
    answer = answer.strip().removesuffix(".")
    if (answer[:2], answer[-2:]) in ((r"\(", r"\)"), (r"\[", r"\]")):
        answer = answer[2:-2].strip()
    answer = re.sub(r"_\{(\w)\}", r"_\1", answer)
    if THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "").replace(" ", "")
    if re.fullmatch(r"[+-]?\d{1,300}", answer, re.ASCII):
        return str(int(answer))
    number = NUMBER.fullmatch(answer)
    exponent = number and (number[2] or number[3] or number[4])
    return rf"{number[1]} \times 10^{{{int(exponent)}}}" if number and exponent else answer


def decide(gold: str, answer: str) -> bool | None:
    """Decides whether two normalized answers are equal if rules suffice or math-verify would be wrong; else None."""
    numbers = [NUMBER.fullmatch(side) for side in (gold, answer)]
    if all(numbers):  # math-verify compares only six decimals
        x, y = (Decimal(f"{n[1]}e{n[2] or n[3] or n[4] or 0}") for n in numbers if n)
        return x == y
    words = [WORDS.fullmatch(WRAPPED.sub(r"\1", side).strip()) for side in (gold, answer)]
    if all(words) and (WRAPPED.search(gold) or WRAPPED.search(answer)):  # math-verify reads "east" as a*e*s*t
        return words[0][1].strip().casefold() == words[1][1].strip().casefold()  # type: ignore[index]
    clocks = [CLOCK.fullmatch(re.sub(r"[\s~]", "", WRAPPED.sub(r"\1", side)).lower()) for side in (gold, answer)]
    if any(clock and clock[2] for clock in clocks):  # without a.m. or p.m. it may be a ratio
        return all(clocks) and clocks[0][1] == clocks[1][1] and len({c[2] for c in clocks} - {None}) == 1  # type: ignore
    if NUMERAL.fullmatch(gold) and NUMERAL.fullmatch(answer):  # math-verify ignores the base
        return gold == answer
    lists = [sorted(_parts(side)) for side in (gold, answer)]
    if any(len(set(parts)) < len(parts) for parts in lists):  # math-verify's sets drop repeated parts
        return lists[0] == lists[1]
    if (TWO_UNITS.search(gold) is None) != (TWO_UNITS.search(answer) is None):  # 3 hours 20 minutes aren't 3
        return False
    return None


def _parts(answer: str) -> Iterator[str]:
    """Splits a list or set at the commas outside of brackets, without spaces."""
    answer = re.sub(r"\s", "", answer)
    if answer[:2] == r"\{" and answer[-2:] == r"\}":
        answer = answer[2:-2]
    depth = start = 0
    for i, character in enumerate(answer):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield normalize(answer[start:i])
            start = i + 1
    yield normalize(answer[start:])
