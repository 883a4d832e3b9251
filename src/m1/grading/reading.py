r"""Reads an answer as a value. Answers are read once each, and then only their values are compared.

A value is a text or a nested list, so that JSON can carry it out of a worker process:

    1/2            a rational number
    ~1.41421356    any other real number, by its leading digits
    'east          a word, or a text that isn't mathematics
    ?x: 1.5 2.5    an expression, by its values at some points (see algebra.py)
    ["()", a, b]   a tuple or an interval, with its brackets;  ["set", ...]  a list or set, sorted
    ["union", ...], ["solution", ...], ["matrix", ...], ["complex", re, im]

Marks are what an answer may leave unsaid: its unit, and the name that it is given in `x = 5`. Two values agree if none
of their marks contradict: `5` agrees with `5 \text{ km}` and `5 \text{ m}`, which don't agree with each other.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import chain, product
from typing import Any, NamedTuple

from m1.grading.spelling import NUMBER, WRAPPED, rewrite, split

SIX_DIGITS = 100_000  # a decimal with six digits, as an integer, is at least this
MAX_DEPTH = 12  # of brackets within brackets
MAX_SIGNS = 4  # of \pm in one part; each doubles the values

Value = Any  # str | list[Value]
UNITS = {
    spelling: words.split()[0]
    for words in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre kms",
        "inch in inche", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram kgs",
        "lb pound lbs", "sec s second", "min minute", "h hour hr", "day", "week", "month", "year yr", "dollar usd",
        "cent", "degree deg", "radian rad", "l liter litre", "ml milliliter millilitre", "mph mi/h",
        "km/h kmh kmph kph", "m/s", "%",
    )
    for spelling in words.split()
}  # fmt: skip

RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")
# Words between numbers (3 hours 20 minutes), and what no value can express.
PROSE = re.compile(rf"\d\s*{WRAPPED}\{{[^{{}}]*[A-Za-z]{{2}}[^{{}}]*\}}[\s,]*\d|\\(?:forall|exists)(?![a-z])")
CHOICE = re.compile(r"\(?([A-H])(?:\)|[.:])\s*(\S.*)")
WORDS = re.compile(r"\(?([A-Za-z][A-Za-z '-]*)[.)]?")
CLOCK = re.compile(r"0?(\d{1,2}:\d\d)(?:([ap])\.?m\.?)?")
NUMERAL = re.compile(r"(\d+)_\{?(\d{1,2})\}?")
FRACTION = re.compile(r"([+-]?)\s*(\d*)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|(?<=\d)/(\d+))")
NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{\w+\}))?(?:'|\^\{-1\})?\s*(?:\([A-Za-z0-9, ]+\))?")
LABEL = re.compile(  # \text{Area}, \angle ABC, [ABC], (x, y), V_1:V_2
    rf"{WRAPPED}\{{[^{{}}]*\}}|m?\\(?:angle|overline|triangle)[ {{A-Z}}]+|[\[|]?[A-Z]{{2,}}[\]|]?"
    r"|\([a-z](?:,\s*[a-z])+\)|[A-Z]_?\w?:[A-Z]_?\w?"
)
TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
UNIT = re.compile(
    rf"(.*\S)\s*{WRAPPED}\{{([^{{}}]*)\}}(?:\s*/\s*{WRAPPED}\{{([^{{}}]*)\}})?\s*(?:\^\{{?-?\d\}}?)?"
    r"|(.*[\d}})])(?:\s+|\\ )([A-Za-z]{2,}[A-Za-z. ]*(?:/[A-Za-z]+)?)(?:\^\{?-?\d\}?)?"
    r"|(.*?)\^\\circ\s*(?:\\?[CF])?|(.*?)\s*\\?%"
)  # fmt: skip


class Unreadable(ValueError):
    """The text isn't mathematics. It is compared as a text."""


class Valueless(Unreadable):
    """The text is mathematics, but has no value (1/0), or the algebra failed on it."""


class NeedsAlgebra(Exception):
    """The text needs an algebra system, which runs in worker processes only."""


class Reading(NamedTuple):
    """What an answer means.

    Attributes:
        value: as described above.
        marks: unit and name of the value, followed by the marks of its parts; "" where there is none.
    """

    value: Value
    marks: tuple[str, ...] = ("", "")


Algebra = Callable[[str], list[Reading]]


def no_algebra(text: str) -> list[Reading]:
    """The algebra of a process that has none. Raises NeedsAlgebra."""
    raise NeedsAlgebra(text)


def read(answer: str, algebra: Algebra = no_algebra) -> list[Reading]:
    r"""All readings of a normalized answer, the usual one first. `50\%` is 50 and 0.5; `A: 5` is A and 5.

    Args:
        algebra: gives the readings of a text that needs an algebra system, and raises Unreadable if there are none.

    Raises:
        NeedsAlgebra: there is no algebra here, and this answer needs it.
        Unreadable: the answer isn't mathematics.
    """
    return _read(rewrite(answer), algebra, 0)


def as_text(answer: str) -> Reading:
    """The reading of an answer that is only a text: case, spaces and markup don't matter."""
    return Reading("'" + re.sub(rf"{WRAPPED}(?=\{{)|[\s{{}}$]", "", answer).casefold())


def agree(one: Reading, other: Reading) -> bool:
    """Whether two readings mean the same. The relation is reflexive and symmetric, but not transitive."""
    return len(one.marks) == len(other.marks) and _consistent([one, other]) and _same(one.value, other.value)


def partition(readings: Sequence[Reading]) -> list[int]:
    """Divides readings into classes: an equivalence. It gives the class of each.

    Readings with equal values are one class if no two of them contradict in a mark. Else readings with equal marks are.
    """
    by_value: dict[str, list[int]] = defaultdict(list)
    for i, reading in enumerate(readings):
        by_value[json.dumps([reading.value, len(reading.marks)])].append(i)
    classes = [0] * len(readings)
    for members in by_value.values():
        together = _consistent([readings[i] for i in members])
        for i in members:
            classes[i] = next(j for j in members if together or readings[i].marks == readings[j].marks)
    return classes


def _consistent(readings: Sequence[Reading]) -> bool:
    return all(len(set(marks) - {""}) <= 1 for marks in zip(*(r.marks for r in readings), strict=True))


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other or (isinstance(one, str) and isinstance(other, str) and _rounded(one, other))
    return len(one) == len(other) and all(map(_same, one, other))


def _rounded(one: str, other: str) -> bool:
    """Whether one is a decimal of at least six digits that rounds or truncates the other, which is no decimal."""
    x, y = number(one), number(other)
    if x is None or y is None or _decimals(x) is _decimals(y) is None:
        return False
    decimal, exact = (x, y) if _decimals(x) is not None else (y, x)
    places = _decimals(decimal)
    if places is None or _decimals(exact) is not None or abs(decimal) * 10**places < SIX_DIGITS:
        return False
    return abs(exact - decimal) < Fraction(1, 10**places)


def number(value: str) -> Fraction | None:
    """The number that a value gives, exactly or by its digits; None if it is no real number."""
    if re.fullmatch(r"-?\d+(?:/\d+)?|~.*", value, re.ASCII):
        return Fraction(Decimal(value[1:])) if value[0] == "~" else Fraction(value)
    return None


def _decimals(x: Fraction) -> int | None:
    """Number of digits behind the point; None if these don't end."""
    places = max(x.denominator.bit_length(), 1)
    return None if 10**places % x.denominator else next(p for p in range(places + 1) if 10**p % x.denominator == 0)


def leaf(text: str) -> Reading:
    """A value without parts."""
    return Reading(text)


def combine(kind: str, parts: Sequence[Reading]) -> Reading:
    """A value of several parts, which are sorted unless their order matters."""
    if kind in ("set", "union", "solution"):
        parts = sorted(parts, key=lambda part: (part.marks[1] if kind == "solution" else "", _order(part)))
    return Reading([kind, *(part.value for part in parts)], ("", "", *chain(*(part.marks for part in parts))))


def _order(part: Reading) -> tuple[float, str]:
    first = part.value
    while isinstance(first, list) and len(first) > 1:
        first = first[1]
    x = number(first) if isinstance(first, str) else None
    infinite = {"inf": 1e999, "-inf": -1e999}.get(first, 1e999) if isinstance(first, str) else 1e999
    return (infinite if x is None or abs(x) > 10**300 else float(x)), json.dumps(part)


def _if_any(algebra: Algebra, text: str) -> list[Reading]:
    """A further reading, which the text may not have."""
    try:
        return algebra(text)
    except Unreadable:
        return []


def _marked(readings: list[Reading], unit: str = "", name: str = "") -> list[Reading]:
    return [r._replace(marks=(unit or r.marks[0], name or r.marks[1], *r.marks[2:])) for r in readings]


def _unnamed(reading: Reading) -> Reading:
    return reading._replace(marks=(reading.marks[0], "", *reading.marks[2:]))


def _read(text: str, algebra: Algebra, depth: int) -> list[Reading]:
    if not text or depth > MAX_DEPTH or PROSE.search(text):
        raise Unreadable(text)
    for reader in (_simple, _list, _named, _brackets, _measured):
        if readings := reader(text, algebra, depth + 1):
            return readings
    return algebra(text)


def _simple(text: str, algebra: Algebra, depth: int) -> list[Reading]:
    """A number, a word, a choice, a time of day or a numeral with its base."""
    found = NUMBER.fullmatch(text)
    if found and abs(exponent := int(found[2] or found[3] or found[4] or 0)) <= 1000:
        return [leaf(str(Fraction(found[1]) * Fraction(10) ** exponent))]
    if (found := FRACTION.fullmatch(text)) and int(found[4] or found[5]):
        whole, top = (int(found[2] or 0), int(found[3])) if found[3] else (0, int(found[2]))
        return [leaf(str((-1 if found[1] == "-" else 1) * (whole + Fraction(top, int(found[4] or found[5])))))]
    if re.fullmatch(r"[+-]?\s*\\infty", text):
        return [leaf("-inf" if text[0] == "-" else "inf")]
    bare = re.sub(rf"{WRAPPED}\s*\{{([^{{}}]*)\}}", r"\1", text).replace("\\ ", " ").strip()
    if found := CHOICE.fullmatch(bare):
        return [leaf(f"'{found[1].casefold()}"), *_if_any(lambda rest: _read(rest, algebra, depth), found[2])]
    if found := WORDS.fullmatch(bare):
        word = found[1].strip()
        readings = [leaf("'" + " ".join(word.casefold().split()))]
        if bare != text or (len(word) == 1 and word not in "ei") or re.search("[A-Za-z]{4}|^[A-Z]{2,}$", word):
            return readings
        return [*_if_any(algebra, word), *readings]  # ab is a product, and no is a word
    squashed = re.sub(r"\s", "", bare).lower()
    if found := CLOCK.fullmatch(squashed):
        ratio = [] if found[2] else _read(squashed.replace(":", "/"), algebra, depth)
        return [*_marked([leaf(f"'{found[1]}")], unit=found[2] or ""), *ratio]
    if text == r"\ldots":
        return [leaf("'...")]
    if found := re.fullmatch(rf"{WRAPPED}\{{([+-]?\d[^{{}}]*|[A-Z](?:, ?[A-Z])+)\}}", text):  # \text{90 degrees}
        return _read(found[1], algebra, depth)
    if found := NUMERAL.fullmatch(text):
        return _marked([leaf(str(int(found[1])))], unit=f"base {found[2]}")
    return []


def _list(text: str, algebra: Algebra, depth: int) -> list[Reading]:
    r"""Values beside each other, also those that \pm stands for."""
    parts = [part for part in split(text, r"[,;]") if part]
    if len(parts) == 1 and RELATION.search(text):
        return []  # x > 1 and x < 3 is one interval
    parts = [signed for part in parts for each in split(part, r"\\land(?![a-z])") for signed in _signs(each)]
    if len(parts) == 1 and parts[0] == text:
        return []
    if len(parts) == 1:
        return _read(parts[0], algebra, depth)
    readings = [_read(part, algebra, depth)[0] for part in parts]
    if all(map(RELATION.search, parts)):
        return [union(readings)]
    names = [reading.marks[1] for reading in readings]
    if all(names) and len(set(names)) > 1:  # p=5,q=2,p=7,q=2 are two solutions, which are (5,2),(7,2) as well
        starts = [i for i, name in enumerate(names) if name == names[0]]
        groups = [readings[i:j] for i, j in zip(starts, [*starts[1:], len(names)], strict=True)]
        tuples = [combine("()", [_unnamed(each) for each in group]) for group in groups]
        solutions = [combine("solution", group) for group in groups]
        return [solutions[0], tuples[0]] if len(groups) == 1 else [combine("set", solutions), combine("set", tuples)]
    others = [combine("()", readings)] if len(readings) < 4 and "," in text else []  # 1,3 may mean (1,3)
    if re.fullmatch(r"[+-]?0,\d+", text):  # 0,111 with a decimal comma
        others.append(leaf(str(Fraction(text.replace(",", ".")))))
    return [combine("set", readings), *others]


def _signs(text: str) -> list[str]:
    r"""The texts that \pm and \mp stand for. With a \mp in it, all signs are chosen together."""
    pieces = re.split(r"\\(pm|mp)(?![a-z])", text)
    signs = pieces[1::2]
    if not signs or re.search("[,;]", text):  # within brackets each part has its own signs
        return [text]
    if len(signs) > MAX_SIGNS:
        raise Unreadable(text)
    choices: Any = product("+-", repeat=len(signs))
    if "mp" in signs:
        choices = [["+-"[(sign == "mp") ^ flip] for sign in signs] for flip in (False, True)]
    texts = ["".join(chain(*zip(pieces[::2], [*choice, ""], strict=True))).strip() for choice in choices]
    return [re.sub(r"^(?:\+\s*|(-)\s+)", r"\1", each) for each in texts]


def union(readings: Sequence[Reading]) -> Reading:
    """The union of intervals and other sets."""
    parts: list[Reading] = []
    for reading in readings:
        parts += _parts(reading) if reading.value[0] == "union" else [reading]
    return parts[0] if len(parts) == 1 else combine("union", parts)


def _parts(reading: Reading) -> list[Reading]:
    """The parts of a union of intervals, which have six marks each: two of their own, and two per end."""
    return [Reading(v, reading.marks[2 + 6 * i : 8 + 6 * i]) for i, v in enumerate(reading.value[1:])]


def _named(text: str, algebra: Algebra, depth: int) -> list[Reading]:
    r"""x = 5, f(x) = 2x, x \in [1, 2], and chains a = b = c, of which the last counts."""
    if member := re.match(r"[A-Za-z](?:_\w)?\s*\\in(?![a-z])\s*", text):
        return _read(text[member.end() :], algebra, depth)
    sides = split(text, r"(?<!\\)=")
    if len(sides) < 2 or not all(sides) or RELATION.search(text):
        return []
    first, last = sides[0], sides[-1]
    if NAME.fullmatch(last) and not NAME.fullmatch(first) and len(sides) == 2 and not re.search("[A-Za-z]", first):
        first, last = last, first  # 5 = x
    letters = re.findall(r"\\[A-Za-z]+|[A-Za-z]", last)
    if NAME.fullmatch(first) and first not in letters:
        has_letters = re.search(r"(?<![\\A-Za-z])[a-z](?![a-z])", last)
        equation = _if_any(algebra, text) if has_letters and len(sides) == 2 else []
        return [*_marked(_read(last, algebra, depth), name=re.sub(r"[\s{}]", "", first).lower()), *equation]
    letters = re.findall(r"(?<![\\A-Za-z])[A-Za-z]", first + last)
    if len(sides) > 2 or LABEL.fullmatch(first) or first[:2] == r"\{" or not letters:
        return _read(last, algebra, depth)
    return []


def _brackets(text: str, algebra: Algebra, depth: int) -> list[Reading]:
    r"""Tuples, intervals and sets, and unions of these."""
    pieces = split(text, r"\\cup(?![a-z])")
    if len(pieces) > 1:
        return [union([_read(piece, algebra, depth)[0] for piece in pieces])]
    found = re.fullmatch(r"(\\\{|[{(\[])(.*?)(\\\}|[})\]])", text, re.DOTALL)
    if not found or len(split(f"{found[2]},", ",")) < 2 or not _balanced(found[2]):
        return []
    opening, inside, closing = found.groups()
    if opening[-1] == "{":
        if condition := re.fullmatch(r"\s*[a-z]\s*(?:\\in\s*\S+\s*)?(?:\\mid|\\vert|\||:)(.*)", inside):
            return _read(condition[1].strip(), algebra, depth)
        return _read(inside.strip(), algebra, depth)[:1]  # {5} is 5, and {1,3} is not (1,3)
    parts = split(inside, ";" if ";" in inside else ",")
    if len(parts) == 1:
        return [] if RELATION.search(inside) and closing != ")" else _read(inside.strip(), algebra, depth)
    if not all(parts):
        raise Unreadable(text)
    several = [_signs(part) for part in parts]
    if len([part for part in several if len(part) > 1]) > MAX_SIGNS:
        raise Unreadable(text)
    if any(len(signed) > 1 for signed in several):  # (\pm 1, 2) is two tuples
        tuples = [f"{opening}{','.join(choice)}{closing}" for choice in product(*several)]
        return _read(",".join(tuples), algebra, depth)
    return [combine(opening + closing, [_read(part, algebra, depth)[0] for part in parts])]


def _balanced(text: str) -> bool:
    """Whether no bracket of the text closes one before it."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _measured(text: str, algebra: Algebra, depth: int) -> list[Reading]:
    r"""A value with its unit behind it: 5 km, 90^\circ, 50\%."""
    found = UNIT.fullmatch(text)
    if RELATION.search(text) or "=" in text or not found:
        return []
    if found.group(6) is not None and TRIG.search(text):
        return []
    before = next(filter(None, found.group(1, 4, 6, 7)), "")
    if not before:
        return []
    words = "/".join(_singular(w) for w in found.group(2, 3, 5) if w)
    if found[5] and words not in UNITS and len(found[5]) < 4:  # 2 ab is a product
        return []
    if found[6] is not None:
        words = "degree"
    elif found[7] is not None or words in ("percent", "percentage", "pct", r"\%"):
        words = "%"
    readings = _marked(_read(before, algebra, depth), unit=UNITS.get(words, ""))
    if words == "%" and isinstance(readings[0].value, str) and re.fullmatch(r"-?\d+(?:/\d+)?", readings[0].value):
        readings += _marked([leaf(str(Fraction(readings[0].value) / 100))], unit="1")
    return readings


def _singular(words: str) -> str:
    words = re.sub(r"^(?:sq|square|cubic|cu)\.? |[\s.]+$|^\s+", "", words.strip().lower())
    return words if words in UNITS else words.removesuffix("s")
