r"""Answers: taken out of a text, compared with golds, put into clusters of equal ones.

Comparison is math-verify's, save for what `_decide` knows better. It runs in worker processes, because it can hang or
exhaust memory on hostile input and its own timeout works in main threads alone: a worker that takes too long, or dies,
is replaced and costs one answer.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import lru_cache
from threading import Lock
from types import TracebackType

from m1.errors import UserError
from m1.reasoning.grading_process import GradingProcess

TIMEOUT_SECONDS = 10.0
MAX_ANSWER_CHARACTERS = 1000  # nothing longer is an answer; it is compared as text only
MAX_ANNOUNCEMENTS = 50  # of an answer, looked at from the end

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# Where an answer is announced. Every repetition is bounded or can't start twice at one place, so a search is linear.
ANNOUNCED = re.compile(
    r"^####[ \t]*(?=\S{0,40}\d\S{0,40}[ \t]*$)"  # GSM8K's
    r"|^[#* \t]{0,20}(?:final[ \t])?answer[#*: \t]{0,20}\n\s{0,20}"  # a heading
    r"|\banswers?\b(?: to [^.:\n]{1,80}?)?[* \t]{0,9}(?:\bis\b|\bare\b|[:=])[:*\s]{0,9}",
    re.IGNORECASE | re.MULTILINE,
)
DELIMITED = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|\$(?!\s)(?P<b>[^$\n]+)(?<!\s)\$|\\\((?P<c>.+?)\\\)|\\\[(?P<d>.+?)\\\]|\*\*(?P<e>[^*\n]+)\*\*",
    re.DOTALL,
)
CLAUSE_END = re.compile(
    r"\n|[.!](?=\s|$)|\*\*\s*$|;\s|,\s+(?!and\b|or\b)[a-z]{2}|\s(?:because|since|as|which|so|where|when|for|but)\b"
)
COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
NOT_UNITS = re.compile(r"\b(?:times|more|less|than|of|plus|minus|not|that|this|if|to)\b|^\d+[.)]\s", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    r"""The final answer of a text, None where it names none. Linear in the text's length.

    1. Behind the last </think>: the last \boxed{} or \fbox{} that isn't empty and whose braces balance, with those that
       only commas, "and" and "or" part from it ("\boxed{1} and \boxed{2}" is "1, 2").
    2. Else behind it: the last announced answer that looks like one: "the answer is 5", "Answer: $x$", a heading
       "Answer", GSM8K's "#### 5", or what is bold in the last line.
    3. Else a \boxed{} in the thought. An announcement there isn't final.

    An announced answer must begin with mathematics: bare words, questions and whole sentences are none.
    """
    thought, closed, reply = text.rpartition("</think>")
    if not closed and "<think>" in text:
        thought, reply = text, ""
    return _boxed(reply) or _announced(reply) or _boxed(thought)


def _boxed(text: str) -> str | None:
    opened: list[tuple[int, int] | None] = []  # of the open braces: where a box and its content begin, None for others
    boxes: list[tuple[int, int, int]] = []
    for match in BOX.finditer(text):
        token = match.group()
        if token == "}":
            box = opened.pop() if opened else None
            if box:
                boxes.append((*box, match.start()))
        elif token == "{" or (token.endswith("{") and len(token) > 2):  # not \{
            opened.append((match.start(), match.end()) if len(token) > 2 else None)
    boxes.sort(reverse=True)
    parts: list[str] = []
    begin = len(text)  # of the box before
    for box_begin, start, end in boxes:
        if end > begin:  # it holds the one before
            continue
        if parts and not _joins(text[end + 1 : begin][:41]):
            break
        content = text[start:end].strip()
        if content:
            parts.append(content)
        begin = box_begin
    return ", ".join(reversed(parts)) or None


def _joins(gap: str) -> bool:
    """Whether what stands between two boxes makes them a list."""
    gap = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", gap)
    return re.sub(r"\\q?quad|\\[()\[\]]|[\s$]", "", gap) in (",", ";", "and", "or", ",and", ",or")


def _announced(text: str) -> str | None:
    text = text.rstrip()
    found = [match.end() for match in ANNOUNCED.finditer(text)]
    last_line = text.rfind("\n") + 1
    bold = list(re.finditer(r"\*\*[^*\n]{1,200}\*\*", text[last_line:]))
    if len(bold) == 1:
        found.append(last_line + bold[0].start())
    last = sorted(found, reverse=True)[:MAX_ANNOUNCEMENTS]
    answers = (_stated(text[start : start + MAX_ANSWER_CHARACTERS]) for start in last)
    return next(filter(None, answers), None)


def _stated(tail: str) -> str | None:
    """The answer a tail of text begins with."""
    delimited = DELIMITED.match(tail)
    rest = tail[delimited.end() :] if delimited else tail
    end = CLAUSE_END.search(rest)
    rest, stop = (rest[: end.start()], end.group()) if end else (rest, "")
    if "?" in rest or "?" in stop:
        return None
    is_list = re.match(r"\s*(?:,|and\b|or\b)", rest) is not None
    if delimited and not is_list:
        rest = ""
    inside = next(filter(None, delimited.groups()), "") if delimited else ""
    answer = re.sub(r"\*\*|\\[()\[\]]|(?<!\\)\$", "", inside + rest).strip(" \t\n:*`.")
    words = re.findall(r"[A-Za-z]{2,}", COMMAND.sub(" ", answer))
    if "\\boxed" in answer:  # one that isn't closed
        return None
    if words and (len(words) > 2 or NOT_UNITS.search(answer) or not re.match(r"[-+]?\\?\$?\.?\d|\\", answer)):
        return None
    return answer if re.match(r"[-+±\u2212]|[\d.(\[{|√\\]|[A-Za-z](?![A-Za-z])", answer) else None


# Spelling that never changes a value. A row's end keeps its backslashes and loses its [8pt].
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
    r"""Without spelling that never changes a value: outer spaces and dollars, a final period, leading zeros, \, and the
    like, thousands' separators. 7e37 is written 7 \times 10^{37}."""
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


def _decide(gold: str, answer: str) -> bool | None:
    """Whether two normalized answers are equal, where math-verify needn't be asked or would be wrong; else None."""
    numbers = [NUMBER.fullmatch(side) for side in (gold, answer)]
    if all(numbers):  # math-verify compares six decimals
        x, y = (Decimal(f"{n[1]}e{n[2] or n[3] or n[4] or 0}") for n in numbers if n)
        return x == y
    words = [WORDS.fullmatch(WRAPPED.sub(r"\1", side).strip()) for side in (gold, answer)]
    if all(words) and (WRAPPED.search(gold) or WRAPPED.search(answer)):  # to math-verify "east" is a*e*s*t
        return words[0][1].strip().casefold() == words[1][1].strip().casefold()  # type: ignore[index]
    clocks = [CLOCK.fullmatch(re.sub(r"[\s~]", "", WRAPPED.sub(r"\1", side)).lower()) for side in (gold, answer)]
    if any(clock and clock[2] for clock in clocks):  # else a ratio
        return all(clocks) and clocks[0][1] == clocks[1][1] and len({c[2] for c in clocks} - {None}) == 1  # type: ignore
    if NUMERAL.fullmatch(gold) and NUMERAL.fullmatch(answer):  # math-verify forgets the base
        return gold == answer
    lists = [sorted(_parts(side)) for side in (gold, answer)]
    if any(len(set(parts)) < len(parts) for parts in lists):  # math-verify's sets forget repeated parts
        return lists[0] == lists[1]
    if (TWO_UNITS.search(gold) is None) != (TWO_UNITS.search(answer) is None):  # 3 hours 20 minutes aren't 3
        return False
    return None


def _parts(answer: str) -> Iterator[str]:
    """The parts of a list or set, spaces removed: what commas outside of brackets part."""
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


class Grader:
    """Decides whether answers are equal; counts what it couldn't decide.

    What needs no algebra is decided here, the rest by math-verify in workers. Use as a context manager or call `close`.

    Attributes:
        timeout: seconds a pair may take.
        counts: "graded": how often a worker was asked for a pair. Of those, "timeout": given up; "crash": the worker
            died or wrote what isn't a reply; "error": math-verify raised. All three are unequal, but a pair that was
            given up for want of time `within` may be asked for again.

    Raises:
        UserError: a timeout or a number of workers that isn't positive.
    """

    def __init__(self, timeout: float = TIMEOUT_SECONDS, workers: int = 1):
        if not timeout > 0 or workers < 1:
            raise UserError(f"timeout={timeout}, workers={workers}: both must be positive")
        self.timeout = timeout
        self.workers = workers
        self.counts: Counter[str] = Counter(graded=0, timeout=0, crash=0, error=0)
        self._known: dict[tuple[str, str], bool] = {}
        self._idle: list[GradingProcess] = []
        self._lock = Lock()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().kill()

    def grade_texts(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> list[bool]:
        """Whether each text's final answer equals one of its golds. No answer is wrong. `workers` grade at a time."""
        rows = [(extract_answer(text), tuple(gold)) for text, gold in zip(texts, golds, strict=True)]
        different = list(dict.fromkeys(rows))  # each is graded, and counted, once
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = pool.map(lambda row: row[0] is not None and self.grade(row[0], row[1]), different)
            known = dict(zip(different, verdicts, strict=True))
        return [known[row] for row in rows]

    def grade(self, answer: str, golds: Sequence[str]) -> bool:
        """Whether the answer equals one of the golds. Raises UserError for one text in place of a list of golds."""
        if isinstance(golds, str):
            raise UserError(f"golds={golds!r}: give a list of texts")
        return any(self.equal(gold, answer) for gold in golds)

    def equal(self, gold: str, answer: str, within: float = math.inf) -> bool:
        """Whether the answer has the gold's value. What can't be decided in time is unequal, and counted.

        Args:
            within: seconds that this call may take, a worker's start included. Where they are too few for an answer,
                the pair isn't remembered as unequal.
        """
        gold, answer = normalize(gold), normalize(answer)
        if gold == answer:
            return bool(gold)
        if not gold or not answer or max(len(gold), len(answer)) > MAX_ANSWER_CHARACTERS:
            return False
        if (gold, answer) not in self._known:
            decided = _decide(gold, answer)
            if decided is None:
                decided = self._ask_worker(gold, answer, within)
            if decided is None:
                return False
            self._known[gold, answer] = decided
        return self._known[gold, answer]

    def cluster(self, answers: Sequence[str | None]) -> dict[str, list[int]]:
        """Indices of equal answers, under the cluster's smallest spelling; None belongs nowhere.

        The clusters don't depend on the answers' order: spellings are visited sorted.
        """
        spellings: dict[str, list[int]] = {}
        for i, answer in enumerate(answers):
            if answer is not None:
                spellings.setdefault(normalize(answer), []).append(i)
        clusters: dict[str, list[int]] = {}
        for spelling in sorted(spellings, key=lambda s: (len(s), s)):
            home = next((c for c in clusters if self.equal(c, spelling)), spelling)
            clusters.setdefault(home, []).extend(spellings[spelling])
        return clusters

    def start(self, within: float = math.inf) -> None:
        """Starts the workers that are missing, so that the first hard pair doesn't wait for one.

        Args:
            within: seconds to wait for them; those that take longer go on starting.
        """
        with self._lock:
            idle, self._idle = self._idle, []

        def started(worker: GradingProcess | None) -> GradingProcess | None:
            try:
                worker = worker or GradingProcess()
                worker.wait(within)
            except (TimeoutError, EOFError, OSError):  # if it's broken, the first hard pair will meet and count it
                if worker and not worker.usable:
                    worker.kill()
            return worker if worker and worker.usable else None

        missing = [None] * (self.workers - len(idle))
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(filter(None, pool.map(started, [*idle, *missing])))
        with self._lock:
            self._idle += found

    def _ask_worker(self, gold: str, answer: str, within: float) -> bool | None:
        """None where `within` was too short to know."""
        deadline = time.monotonic() + within
        with self._lock:
            self.counts["graded"] += 1
            worker = self._idle.pop() if self._idle else None
        reply = "crash"
        try:
            worker = worker or GradingProcess()
            worker.wait(within)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            reply = worker.ask(gold, answer, min(self.timeout, left))
        except TimeoutError:
            reply = "timeout"
        except (EOFError, OSError):
            pass
        finally:
            with self._lock:
                if reply in self.counts:
                    self.counts[reply] += 1
                if worker and worker.usable:
                    self._idle.append(worker)
            if worker and not worker.usable:
                worker.kill()
        return None if reply == "timeout" and time.monotonic() >= deadline else reply == "equal"
