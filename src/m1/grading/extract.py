r"""Extracts the final answer from a text: a \boxed{}, or an announcement such as "the answer is 5"."""

import re

from m1.grading.spelling import MAX_ANSWER_CHARACTERS

MAX_ANNOUNCEMENTS = 50  # announcements that are read per text, from its end

# A box, also one without braces (\boxed 6) or with a second backslash, and what moves the depth of braces.
BOX = re.compile(
    r"\\{1,2}(?:boxed|fbox)(?:\s*\{|\s*(?P<bare>-?\d[\d.,]*(?<![.,])|(?<=\s)[A-Za-z](?![A-Za-z])))|\\.|[{}]", re.DOTALL
)
# The tags some models are trained to put around an answer.
TAGS = (("<answer>", "</answer>"), ("<|begin_of_box|>", "<|end_of_box|>"))
# A base model goes on with the next problem behind its answer.
RUN_ON = re.compile(r"\n\s{0,9}(?:Question|Problem|Q|Human|User):")
# Announcements of an answer. A search takes linear time: every repetition is bounded or has only one possible start.
ANNOUNCED = re.compile(
    r"^####[ \t]*(?=\S{0,40}\d\S{0,40}[ \t]*$)"  # GSM8K's
    r"|^[#* \t]{0,20}(?:final[ \t])?answer[#*: \t]{0,20}\n\s{0,20}"  # a heading
    r"|\\textbf\{(?:final )?answer[.:]?\}[.:]?\s{0,9}"
    r"|\banswer[ \t](?=\$|\\\(|\\\[)"
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


def with_thought(prompt: str, text: str) -> str:
    """The generated text with the <think> that its prompt ended with: some chat templates open the thought."""
    return f"<think>{text}" if opens_thought(prompt) else text


def opens_thought(prompt: str) -> bool:
    """Whether a prompt's text ends with an open <think>."""
    return prompt.rstrip().endswith("<think>")


def extract_answer(text: str) -> str | None:
    r"""Finds the final answer of a text; None if there is none. Takes time linear in the text's length.

    Text before the last </think> is thought and the rest is reply. Without </think>, a text is all reply, or all
    thought if it has a <think> (see `with_thought`). The first of these that exists is the answer:

    1. In the reply, what the last <answer></answer> or <|begin_of_box|><|end_of_box|> holds.
    2. In the reply, "the final answer is 5" behind all boxes.
    3. In the reply, the last \boxed{} or \fbox{} that has content and balanced braces and isn't an approximation of
       one before it. Boxes separated only by commas, "and" or "or" form a list: "\boxed{1} and \boxed{2}" gives "1, 2".
    4. In the reply, the last announced answer. Announcements are "the answer is 5", "Answer: $x$", a heading
       "Answer", GSM8K's "#### 5", and the only bold text of the last line.
    5. In the thought, the last \boxed{} or \fbox{}. Announcements in it are ignored, because they aren't final.

    An announced answer must begin with mathematics. Bare words, questions and whole sentences don't count. Behind the
    answer, a reply ends where the model goes on with another "Question:".
    """
    thought, closed, reply = text.rpartition("</think>")
    if not closed and "<think>" in text:
        thought, reply = text, ""
    run_on = RUN_ON.search(reply)
    first = _final(reply[: run_on.start()]) if run_on else None
    return first or _final(reply) or _boxed(thought)[0]


def _final(reply: str) -> str | None:
    box, end = _boxed(reply)
    if box and (final := max(reply.rfind("inal answer is"), reply.rfind("INAL ANSWER IS"))) > end:
        box = _announced(reply[final:].replace("inal", "", 1)) or box
    return _tagged(reply) or box or _announced(reply)


def _tagged(text: str) -> str | None:
    """What the last pair of tags holds: a box in it, or all of it."""
    for opening, closing in TAGS:
        end = text.rfind(closing)
        start = text.rfind(opening, 0, max(end, 0))
        if end > start >= 0 and end - start <= MAX_ANSWER_CHARACTERS:
            content = text[start + len(opening) : end]
            if found := _boxed(content)[0] or content.strip().strip("$").strip():
                return found
    return None


def _boxed(text: str) -> tuple[str | None, int]:
    """The last box's content, or a list of several, and where it ends."""
    opened: list[tuple[int, int] | None] = []  # per open brace: start of the box and of its content, or None
    boxes: list[tuple[int, int, int]] = []
    for match in BOX.finditer(text):
        token = match.group()
        if match["bare"]:
            boxes.append((match.start(), match.start("bare"), match.end()))
        elif token == "}":
            box = opened.pop() if opened else None
            if box:
                boxes.append((*box, match.start()))
        elif token == "{" or (token.endswith("{") and len(token) > 2):  # not \{
            opened.append((match.start(), match.end()) if len(token) > 2 else None)
    boxes.sort(reverse=True)
    parts: list[str] = []
    begin, last = len(text), -1  # begin of the previous box: they are visited from the last to the first
    approximation = None
    for box_begin, start, end in boxes:
        if end > begin:  # it contains the previous one
            continue
        gap = text[end:begin][:41].removeprefix("}")
        if parts and not _joins(gap):
            break
        content = text[start:end].strip()
        if content.startswith(r"\approx") or text[max(0, box_begin - 9) : box_begin].rstrip(" $").endswith(r"\approx"):
            approximation = approximation or (content, end)
        elif content:
            parts.append(content)
            last = max(last, end)
        begin = box_begin
    if approximation and not parts:
        return approximation
    return ", ".join(reversed(parts)) or None, last


def _joins(gap: str) -> bool:
    """Whether the text between two boxes makes them parts of one list."""
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
    """The answer at the beginning of the text after an announcement; None if it doesn't look like one."""
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
    if "\\boxed" in answer:  # an unclosed box
        return None
    if words and (len(words) > 2 or NOT_UNITS.search(answer) or not re.match(r"[-+]?\\?\$?\.?\d|\\", answer)):
        return None
    return answer if re.match(r"[-+±\u2212]|[\d.(\[{|√\\]|[A-Za-z](?![A-Za-z])", answer) else None
