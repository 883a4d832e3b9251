r"""Spellings of answers: `normalize` and `rewrite` remove what never changes a value, `split` finds a list's parts."""

import re
from collections.abc import Callable
from functools import lru_cache

MAX_ANSWER_CHARACTERS = 1000  # longer texts aren't answers, and are compared as texts only

# Spelling that never changes a value. The end of a matrix row keeps its backslashes and loses its spacing [8pt].
SPACING = re.compile(r"(\\\\)(?:\s*\[-?[\d.]+\s*[a-z]{2}\])?|\\!\s*|\\[,;:$]")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?")
NUMBER = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(?:e([+-]?\d{1,4})|\s*(?:\\times|\\cdot|\*|\u00d7)\s*10\^(?:\{\s*([+-]?\d{1,4})\s*\}|(\d)))?",
    re.IGNORECASE,
)
WRAPPED = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)"
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|exp|log|ln|sqrt"
UNICODE = str.maketrans(
    {"\u00b2": "^2", "\u00b3": "^3", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00d7": r"\times ", "\u20ac": ""}
    | {"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b0": r"^\circ", "\u00b1": r"\pm ", "\u2212": "-"}
    | {"\u2208": r"\in ", "\u2248": r"\approx ", "\u221a": r"\sqrt ", "\u2205": r"\emptyset ", "\u222a": r"\cup "}
    | {"\u00b7": r"\cdot "}
)
FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)

Replacement = str | Callable[[re.Match[str]], str]


def _repeating(match: re.Match[str]) -> str:
    whole, before, period = match[1] or "0", match[2], match[3] or match[4]
    difference = int(whole + before + period) - int(whole + before)
    return rf"\frac{{{difference}}}{{{'9' * len(period)}{'0' * len(before)}}}"


def _fraction(match: re.Match[str]) -> str:
    if match[0] == match.string.strip().lstrip("+-"):  # a plain number
        return match[0]
    return rf"{{\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}}}"


# (pattern, replacement), applied in this order, each with an example.
TABLE: list[tuple[str, Replacement]] = [
    (r"\\(?:displaystyle|limits|[bB]igg?[lr]?|left\s*\.|right\s*\.|left|right)(?![a-z])", ""),  # \left( 1 \right)
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),  # \dfrac12
    (r"\\(?:l|r)brace", lambda m: r"\{" if m[0][1] == "l" else r"\}"),  # \lbrace 1 \rbrace
    (r"\\langle", "("),  # \langle 1, 2 \rangle
    (r"\\rangle", ")"),
    (r"\\(?:leqslant|leq|le)(?![a-z])", r"\\le "),  # 1 \leqslant x
    (r"\\(?:geqslant|geq|ge)(?![a-z])", r"\\ge "),
    (r"\\(?:neq|ne)(?![a-z])", r"\\ne "),
    (r"\\(?:lt|gt)(?![a-z])", lambda m: "<" if m[0] == r"\lt" else ">"),  # x \gt 2
    (r"<=|>=|!=", lambda m: {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne "}[m[0]]),  # x <= 2
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"),  # \varnothing, \{\}
    (r"\\[dt]binom(?![a-z])", r"\\binom"),  # \dbinom52
    (r"\\(?:text|mathrm|mathbf)\{([ei])\}", r"\1"),  # 3\mathrm{i}
    (r"\\imath(?![a-z])", "i"),
    (rf"(?i)^{WRAPPED}\{{\s*(?:the )?(?:final )?answer(?: is)?\s*[:.]?\s*\}}\s*[:.]?\s*", ""),  # \text{Answer: } 6
    (r"(?i)^(?:the|so|thus|hence)\b[^=<>{}]*\b(?:is|are|equals)\s+(?=\S)", ""),  # The area of ABC is 6
    (rf"\s*(?:\\q?quad\s*)*{WRAPPED}\{{\s*\(?\s*approx.*$", ""),  # \frac13 \text{ (approximately } 0.333 \text{)}
    (r"^\s*\\approx\s*", ""),  # \approx 1.41
    (r"(?<=\S)\s*(?:\\approx|\\simeq).*$", ""),  # \sqrt2 \approx 1.41
    (rf"\s*,?\s*(?:{WRAPPED}\{{\s*,?\s*and\s*\}}|(?<![A-Za-z\\])and(?![A-Za-z])|\\wedge(?![a-z]))\s*", r" \\land "),
    (rf"\s*,?\s*(?:{WRAPPED}\{{\s*,?\s*or\s*\}}|(?<![A-Za-z\\])or(?![A-Za-z])|\\lor(?![a-z]))\s*", ", "),
    (r"\\q?quad(?![a-z])", " "),
    (r"\\dots[a-z]?(?![a-z])|\\[lcd]dots(?![a-z])|\.\.\.", r"\\ldots "),  # 1, 2, \dots, n
    (r"\\bmod|\\operatorname\{mod\}", r"\\mod"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?(?![a-z])|\\degree(?![a-z])", r"^\\circ "),  # 90^{\circ}
    (r"(?<![\\A-Za-z])(?:np|math)\.(?=[a-z])", ""),  # np.arcsin(10/13)
    (rf"(?<![\\A-Za-z])({FUNCTIONS}|pi)(?![a-zA-Z])", r"\\\1 "),  # -1+exp(16), 2*pi
    (r"\\exp\s*\(([^()]*)\)", r"e^{\1}"),
    (r"\*\*", "^"),  # 2**10
    (r"\s+\^", "^"),  # \sin ^2 x
    (r"(?<=\d)\.(?![\d.\\])", ""),  # 1./3
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),  # sqrt(5)
    (r"\^\(([^()]*)\)", r"^{\1}"),  # x^(1/2)
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", _repeating),  # 0.\overline{36}
    (r"(?<![\d.\\])(\d*)\.(\d+)(?![\d.])", _fraction),  # \sqrt{10.5}: sympy's floats aren't exact
    (r"\+/-|\+-", r"\\pm "),  # 3+-2
]  # fmt: skip
RULES = [(re.compile(pattern), replacement) for pattern, replacement in TABLE]


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
        .replace("~", " ")
        .strip()
        .strip("$")
    )
    answer = re.sub(r"(?<!\\)\\(?:\s|$)", " ", answer).strip().removesuffix(".").rstrip()
    while answer[:1] == "{" and _closing(answer) == len(answer) - 1:  # {(2,4)}
        answer = answer[1:-1].strip()
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


def rewrite(answer: str) -> str:
    r"""Spells a normalized answer in the one way that `reading` knows: by RULES, and with braces around arguments.

    Blank lines part a list. Of a sentence with one formula in it, the formula is left.
    """
    answer = re.sub(r"\\?\"|``|''", "", answer.translate(UNICODE))  # "12"
    formulas = [next(filter(None, found.groups())) for found in FORMULA.finditer(answer)]
    if len(formulas) == 1 and re.search("[A-Za-z]{3}", re.sub(r"\b(?:and|or)\b", "", FORMULA.sub(" ", answer))):
        answer = formulas[0]
    answer = answer.replace("$", "")
    answer = re.sub(r"\s+", lambda m: ", " if m[0].count("\n") > 1 else " ", answer)
    if answer.count("}") > answer.count("{") and answer[-1:] == "}":
        answer = answer[:-1]
    for pattern, replacement in RULES:
        answer = pattern.sub(replacement, answer)
    return _braced(answer).strip().strip(",;").strip()


def _braced(text: str) -> str:
    r"""Puts braces around the arguments of \frac and \sqrt: \frac2\pi, \frac{\sqrt3}2."""
    out, start = "", 0
    for match in re.finditer(r"\\(frac|sqrt)(?![a-z])\s*(\[[^\[\]]*\])?", text):
        if match.start() < start:  # within an argument, which was done already
            continue
        out += text[start : match.start()] + rf"\{match[1]}{match[2] or ''}"
        start = match.end()
        for _ in range(2 if match[1] == "frac" else 1):
            argument, start = _argument(text, start)
            out += f"{{{_braced(argument)}}}"
    return out + text[start:]


def _argument(text: str, start: int) -> tuple[str, int]:
    """The LaTeX argument at `start` and its end: a group in braces, a command with its group, or one character."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if text[start : start + 1] == "{":
        end = start + _closing(text[start:])
        return (text[start + 1 : end], end + 1) if end >= start else (text[start + 1 :], len(text))
    command = re.compile(r"\\(?:sqrt\s*(?:\{[^{}]*\}|\w)|[A-Za-z]+|.)|.|$", re.DOTALL).match(text, start)
    assert command
    return command[0], command.end()


def _closing(text: str) -> int:
    """The index of the brace that closes the one at the beginning of the text; -1 if there is none."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (match[0] == "{") - (match[0] == "}")
        if match[0] == "}" and depth == 0:
            return match.start()
    return -1


def split(text: str, separator: str) -> list[str]:
    r"""Splits a text where the pattern matches outside of all brackets. A set's \{ is a bracket, too."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"(?P<by>{separator})|\\?[()\[\]{{}}]|\\[A-Za-z]+", text):
        bracket = match[0][-1]
        if match["by"] is None:
            depth += (bracket in "([{") - (bracket in ")]}")
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]
