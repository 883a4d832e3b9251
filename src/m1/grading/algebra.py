"""The algebra of a worker process: values of LaTeX texts, by math-verify's parser and sympy. It may hang.

Numbers are evaluated to 30 digits. Expressions with letters are evaluated at fixed points, so that equal expressions
have equal values however they are spelled. At the last point all letters are negative. It tells |x| from x, and counts
only where the value is real: 1/sqrt(n) is sqrt(1/n) wherever both are real.
"""

import re
from fractions import Fraction
from zlib import crc32

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from sympy import (
    And,
    Basic,
    Derivative,
    E,
    Expr,
    FiniteSet,
    Float,
    I,
    Interval,
    MatrixBase,
    Ne,
    Or,
    Rational,
    S,
    Set,
    Symbol,
    Tuple,
    Union,
    oo,
)
from sympy.core.function import AppliedUndef
from sympy.core.relational import Equality, Relational

from m1.grading.reading import Reading, Unreadable, Valueless, combine, leaf, union
from m1.grading.spelling import split

DIGITS = 15  # of a value that isn't rational
MAX_DENOMINATOR = 10**6  # a number within 1e-22 of such a fraction is this fraction
POINTS = (1, 1, -1)  # signs of the letters' values
# As math-verify's, but units and boxes are gone already.
PARSER = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
CONSTANTS = {"i": I, "e": E, "π": S.Pi}


def algebra(text: str) -> list[Reading]:
    """The readings of a LaTeX text, the usual one first.

    Raises:
        Unreadable: it isn't LaTeX that the parser knows.
        Valueless: it has no value, or sympy failed.
    """
    try:
        parts = [_parse(part) for part in split(text, r"\\land(?![a-z])")]
    except Exception as error:  # the parser raises anything, and so does sympy
        raise Unreadable(str(error)[:100]) from None
    try:
        return [_reading(And(*parts) if len(parts) > 1 else parts[0])]
    except Unreadable:
        raise
    except Exception as error:
        raise Valueless(str(error)[:100]) from None


def _parse(text: str) -> Basic:
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\1\\cdot\\pi/180)", text)
    text = re.sub(r"(?<!\\)\*", r" \\cdot ", text)
    return latex2sympy(normalize_latex(text, PARSER), normalization_config=None)


def _reading(value: Basic) -> Reading:
    if isinstance(value, (Relational, And, Or)):
        return _relation(value)
    if isinstance(value, Set):
        return _set(value)
    if isinstance(value, Tuple):
        return combine("()", [_reading(part) for part in value])
    value = _plain(value)
    if isinstance(value, MatrixBase):
        return combine("matrix", [combine("row", [_reading(x) for x in value.row(i)]) for i in range(value.rows)])
    if value in (oo, -oo):
        return leaf("inf" if value == oo else "-inf")
    if not isinstance(value, Expr) or value.has(S.NaN, S.ComplexInfinity, oo, -oo):
        raise Valueless(str(value)[:100])
    letters = sorted(symbol.name for symbol in value.free_symbols)
    if isinstance(value, Symbol):
        return leaf(f"'{value.name}")
    if letters:
        return leaf(f"?{','.join(letters)}: {' '.join(_digits(x) for x in _values(value))}")
    return _constant(value)


def _plain(value: Basic) -> Basic:
    """The same with i, e and functions' values in place, letters in lower case, and exact decimals."""
    value = _opaque(value).doit()
    names = {symbol: symbol.name.replace(" ", "").lower() for symbol in value.free_symbols}
    value = value.xreplace({symbol: CONSTANTS.get(name, Symbol(name)) for symbol, name in names.items()})
    return value.xreplace({x: Rational(str(x)) for x in value.atoms(Float)}).doit()


def _opaque(value: Basic) -> Basic:
    """The same with letters for f(x) and dy/dx, which sympy takes for a function of x and for 0."""
    unknown = [d for d in value.atoms(Derivative) if not d.expr.free_symbols & set(d.variables)]
    value = value.xreplace({part: Symbol(f"d({part})") for part in unknown})
    return value.xreplace({f: Symbol(str(f)) for f in value.atoms(AppliedUndef)})


def _constant(value: Expr) -> Reading:
    if isinstance(value, Rational):
        return leaf(str(Fraction(int(value.p), int(value.q))))
    real, imaginary = (leaf(_digits(part)) for part in value.evalf(30).as_real_imag())
    return real if imaginary.value == "0" else combine("complex", [real, imaginary])


def _values(value: Expr) -> list[Expr]:
    """The values at POINTS."""
    found = []
    for k, sign in enumerate(POINTS):
        at = {s: Rational(sign * (3000 + crc32(f"{k}{s.name}".encode()) % 9001), 4001) for s in value.free_symbols}
        x = value.xreplace(at).doit().evalf(30)
        found.append(x if sign > 0 or value.has(I) or abs(x.as_real_imag()[1]) < 1e-20 else S.Zero)
    return found


def _digits(x: Expr) -> str:
    """A number by its exact fraction if it has a small denominator, else by its digits; a complex one by both parts."""
    real, imaginary = x.as_real_imag()
    if abs(imaginary) > 1e-20 * max(1, abs(real)):
        return f"{_digits(real)}+i*{_digits(imaginary)}"
    if not real.is_number or not real.is_finite:
        raise Valueless(str(x)[:100])
    if abs(real) < Float("1e-60"):
        return "0"
    exact = Fraction(str(real.evalf(30)))
    near = exact.limit_denominator(MAX_DENOMINATOR)
    if near and abs(exact - near) * 10**22 <= (abs(near) if abs(near) > 1 else 1):
        return str(near)
    return f"~{real.evalf(DIGITS + 3):.{DIGITS - 1}e}"


def _set(value: Set) -> Reading:
    value = value.doit()
    if value is S.EmptySet:
        return leaf(r"'\emptyset")
    if value is S.Reals:
        value = Interval(-oo, oo)
    if isinstance(value, Interval):
        brackets = ("(" if value.left_open else "[") + (")" if value.right_open else "]")
        return combine(brackets, [_reading(value.start), _reading(value.end)])
    if isinstance(value, Union):
        return union([_set(part) for part in value.args])
    if isinstance(value, FiniteSet):
        parts = [_reading(part) for part in value.args]
        return parts[0] if len(parts) == 1 else combine("set", parts)
    raise Unreadable(str(value)[:100])


def _relation(value: Basic) -> Reading:
    """A condition on one letter is the set of its solutions. Others are compared up to a factor of both sides."""
    if isinstance(value, Equality):
        return leaf(f"?= {_proportions(value)}")
    value = _opaque(value)
    letters = {symbol.name.lower() for symbol in value.free_symbols}
    if len(letters) == 1:
        solutions = _set(value.as_set())
        return solutions._replace(marks=("", letters.pop(), *solutions.marks[2:]))
    if not isinstance(value, Relational) or isinstance(value, Ne):
        raise Unreadable(str(value)[:100])
    oriented = value if value.rel_op in ("<", "<=") else value.reversed
    return leaf(f"?{oriented.rel_op} {_proportions(oriented)}")


def _proportions(value: Relational) -> str:
    """The difference of both sides at the points, divided by the first one's: all of it for =, else its size."""
    difference = _plain(value.lhs - value.rhs)
    if not difference.free_symbols:
        raise Unreadable(str(value)[:100])
    values = _values(difference)
    scale = values[0] if isinstance(value, Equality) else abs(values[0])
    letters = ",".join(sorted(symbol.name for symbol in difference.free_symbols))
    return f"{letters}: {' '.join(_digits(x / scale) for x in values)}"
