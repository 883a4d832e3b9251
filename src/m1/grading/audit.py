r"""A second, independent grader that finds doubtful grades: where the two graders differ, one of them is wrong.

It uses no algebra system, and shares nothing with `Grader` and math-verify. It removes markup, splits answers at commas
and evaluates each part in complex floating point. Letters get fixed arbitrary values, so equal expressions agree. Parts
that can't be evaluated are compared as texts.
"""

import cmath
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from m1.errors import UserError

TOLERANCE = 1e-6  # relative
MAX_RAW = 1000  # characters; longer answers are compared as texts before any pattern sees them: some are quadratic
MAX_CHARACTERS = 500  # the same for answers without their markup, because the parser recurses
TOKEN = re.compile(r"\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|\\[A-Za-z]+|[^\s~]")
FUNCTIONS = {
    **{f"\\{name}": getattr(cmath, name) for name in ("sin", "cos", "tan", "exp")},
    **{f"\\arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")},
    **{"\\ln": cmath.log, "\\cot": lambda z: 1 / cmath.tan(z), "\\sec": lambda z: 1 / cmath.cos(z)},
}


@dataclass(frozen=True)
class Audit:
    """The result of grading samples a second time.

    Attributes:
        agreed: number of samples on which both graders agree.
        disagreements: the rows of all other samples.
    """

    agreed: int
    disagreements: list[dict[str, Any]]


def audit(rows: Iterable[dict[str, Any]]) -> Audit:
    """Grades samples a second time and compares the verdicts.

    Args:
        rows: one {"answer": text or None, "correct": bool, "golds": [text, ...], ...} per sample. "correct" is the
            first grader's verdict.

    Raises:
        UserError: one of these keys is missing from a row.
    """
    agreed, disagreements = 0, []
    for number, row in enumerate(rows, start=1):
        if missing := {"answer", "correct", "golds"} - row.keys():
            raise UserError(f"row {number} has no {', '.join(sorted(missing))}; it has {', '.join(sorted(row))}")
        verdict = row["answer"] is not None and any(same(gold, row["answer"]) for gold in row["golds"])
        if verdict == row["correct"]:
            agreed += 1
        else:
            disagreements.append(row)
    return Audit(agreed, disagreements)


def same(gold: str, answer: str) -> bool:
    """Whether two answers look equal. Order matters in tuples and intervals, but not in lists and sets."""
    if max(len(gold), len(answer)) > MAX_RAW:
        return gold.strip() == answer.strip()
    gold, answer = clean(gold), clean(answer)
    if gold == answer:
        return bool(gold)
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return False
    ours, theirs = split(gold), split(answer)
    if len(ours) != len(theirs):
        return False
    if len(ours) == 1 and gold[:1] + gold[-1:] == answer[:1] + answer[-1:] and gold[0] in "([" and gold[-1] in ")]":
        ours, theirs = split(gold[1:-1]), split(answer[1:-1])
        return (len(ours) == len(theirs) > 1 and all(map(same, ours, theirs))) or close(gold, answer)
    if len(ours) == 1:
        return close(gold, answer)
    for part in ours:
        found = next((other for other in theirs if same(part, other)), None)
        if found is None:
            return False
        theirs.remove(found)
    return True


def clean(text: str) -> str:
    """Removes markup, spaces, units and the name of the unknown ("x =")."""
    text = re.sub(r"\\(?:begin|end)\{[a-z]*matrix\}", lambda m: "(" if "begin" in m[0] else ")", text)
    text = re.sub(r"\\\\(?:\[\w*\])?|&", ",", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[!,;: $])|\$|\^\{?\\circ\}?|\{,\}\s*(?=\d)", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).lower()
    text = re.sub(r"\\?%|\b(?:percent(?:age)?|pct)\b", "", text)
    text = re.sub(r"(?:,|\b)\s*\\?(?:text|mbox)?\{?\s*\b(?:and|or)\b\s*\}?", ",", text)
    text = re.sub(r"(?<=[\d)}])\s*\\(?:text|mbox|mathrm)\{(?!\s*[ap]\.m)[a-z. ]*\}(?:\^\{?\d\}?)?$", "", text.strip())
    text = re.sub(r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}", r"\1", text)
    if re.fullmatch(r"-?[1-9]\d{0,2}([, ]+\d{3})+(\.\d+)?", text):
        text = re.sub("[, ]", "", text)
    text = re.sub(r"(\\[a-z]+)\s+(?=[a-z])", r"\1~", text)  # \sin x isn't \sinx
    text = re.sub(r"\s|\.$", "", text)
    text = re.sub(r"^\{(.*)\}$|^\\\{(.*)\\\}$|^\(([a-z])\)$", lambda m: m[1] or m[2] or m[3] or "", text)
    return re.sub(r"^[a-z](?:\([a-z]\))?(?:=|\\in)", "", text)


def split(text: str) -> list[str]:
    """Splits a text at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def close(gold: str, answer: str) -> bool:
    """Whether both can be evaluated and agree, for two choices of the letters' values."""
    try:
        for shift in (0.0, 0.61):
            x, y = (Evaluation(text, shift).result() for text in (gold, answer))
            if not abs(x - y) <= TOLERANCE * max(abs(x), abs(y)):
                return False
    except (ValueError, ArithmeticError, IndexError, RecursionError):
        return False
    return True


class Evaluation:
    """Computes the value of a LaTeX expression by recursive descent. `result` gives it as a complex number.

    Methods raise ValueError or IndexError if the text isn't an expression.

    Args:
        text: the expression, after `clean`.
        shift: is added to the value of every letter.
    """

    def __init__(self, text: str, shift: float):
        self.tokens = TOKEN.findall(text)[::-1]  # reversed: pop() takes the next one
        self.shift = shift

    def result(self) -> complex:
        """The value of the whole text."""
        value = self.sum()
        if self.tokens:
            raise ValueError(self.tokens[-1])
        return value

    def peek(self) -> str:
        """The next token; empty at the end."""
        return self.tokens[-1] if self.tokens else ""

    def sum(self) -> complex:
        """Products, added and subtracted."""
        value = self.product()
        while self.peek() in ("+", "-"):
            value += self.product() if self.tokens.pop() == "+" else -self.product()
        return value

    def product(self) -> complex:
        """Powers, multiplied and divided; also implicit products such as 2x."""
        value = self.power()
        while self.peek() not in ("", "+", "-", ")", "}", "]"):
            if self.peek() in ("/", ":"):
                self.tokens.pop()
                value /= self.power()
                continue
            if self.peek() in ("*", r"\cdot", r"\times"):
                self.tokens.pop()
            value *= self.power()
        return value

    def power(self) -> complex:
        """An atom with its exponent and signs."""
        token = self.peek()
        if token in ("-", "+"):
            self.tokens.pop()
            return -self.power() if token == "-" else self.power()
        value = self.atom()
        if self.peek() == "^":
            self.tokens.pop()
            value **= self.group() if self.peek() == "{" else self.power()
        return value

    def atom(self) -> complex:
        """A number, constant, letter, function, fraction, root or bracket."""
        token = self.tokens.pop()
        if token[0].isdigit() or token[0] == ".":
            mixed = re.fullmatch(r"\\frac(?:\d\d|\{\d+\}\{\d+\})", "".join(self.tokens[::-1][:7]))
            return float(token) + (self.power() if mixed and token.isdigit() else 0)
        if token in ("(", "{"):
            value = self.sum()
            if self.tokens.pop() != {"(": ")", "{": "}"}[token]:
                raise ValueError(token)
            return value
        if token == r"\frac":
            return self.group() / self.group()
        if token == r"\sqrt":
            root: complex = 2
            if self.peek() == "[":
                self.tokens.pop()
                root = self.sum()
                self.tokens.pop()
            return self.group() ** (1 / root)
        if token in FUNCTIONS:
            return FUNCTIONS[token](self.power())
        if token in ("e", "i", r"\pi"):
            return {"e": math.e, "i": 1j, r"\pi": math.pi}[token]
        if re.fullmatch(r"[a-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|omega|rho|sigma|tau)", token):
            return 0.7 + self.shift + sum(map(ord, token)) % 101 / 13
        raise ValueError(token)

    def group(self) -> complex:
        r"""The value of one pair of braces, one digit or one letter: \frac12 is one half."""
        token = self.peek()
        if len(token) > 1 and token.isdigit():
            self.tokens[-1:] = [token[1:], token[0]]
            return float(self.tokens.pop())
        return self.atom()
