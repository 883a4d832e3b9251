"""Draws the pictures of README.md and docs/ into docs/images/. `--check` only compares.

python docs/pictures.py [--check]
"""

import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
WIDTH = 640
INK, SOFT, PAPER = "#1f2933", "#61707d", "#ffffff"
BLUE, GREEN, ORANGE, GREY, RED = "#d6e6f7", "#d9efd9", "#fbe3c4", "#eceff1", "#f7d6d6"


class Picture:
    """An SVG of a width of WIDTH, on white, so that it can be read on any page."""

    def __init__(self, height: int, title: str):
        self.height, self.title, self.parts = height, title, []

    def box(self, x, y, width, height, text, fill=GREY, dashed=False, size=16) -> None:
        """A rounded box with lines of text in its middle."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"{dash}/>'
        )
        lines = text.split("\n")
        for i, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + (i - (len(lines) - 1) / 2) * (size + 3), line, size=size)

    def text(self, x, y, text, size=16, anchor="middle", colour=INK, bold=False) -> None:
        """One line of text, centred on y."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" dominant-baseline="central"'
            f' fill="{colour}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, x1, y1, x2, y2, dashed=False) -> None:
        """A line with a head at its end."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.6"{dash}'
            ' marker-end="url(#head)"/>'
        )

    def bar(self, x1, x2, y, fill, dashed=False) -> None:
        """A horizontal bar."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x1}" y="{y - 8}" width="{x2 - x1}" height="16" rx="4" fill="{fill}" stroke="{INK}"{dash}/>'
        )

    def __str__(self) -> str:
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img"'
            f' font-family="Helvetica, Arial, sans-serif">\n<title>{escape(self.title)}</title>\n'
            f'<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
            f' orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{self.height}" rx="10" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )


def overview() -> Picture:
    """Which weights go where, and the way from a transformer to an answer."""
    picture = Picture(480, "An attention layer's weights become a Mamba layer's; then the hybrid is trained and votes")
    picture.text(150, 26, "attention layer", bold=True)
    picture.text(490, 26, "Mamba layer", bold=True)
    names = [
        ("Q", "C", "what is read"),
        ("K", "B", "what is written"),
        ("V", "x", "the value"),
        ("O", "out", "the output"),
    ]
    for i, (old, new, what) in enumerate(names):
        y = 48 + 44 * i
        picture.box(100, y, 100, 34, old, BLUE, size=17)
        picture.arrow(204, y + 17, 432, y + 17)
        picture.text(318, y + 6, what, size=15, colour=SOFT)
        picture.box(440, y, 100, 34, new, BLUE, size=17)
    picture.box(370, 226, 240, 34, "new: z, dt, conv, A, D", ORANGE, dashed=True)
    picture.text(150, 236, "cache: grows with", size=15, colour=SOFT)
    picture.text(150, 254, "every token", size=15, colour=SOFT)
    picture.text(490, 276, "state: always the same size", size=15, colour=SOFT)
    steps = [
        ("convert", "copy weights", BLUE),
        ("distil", "KL from teacher", GREEN),
        ("SFT", "worked solutions", GREEN),
        ("RL", "right answers", GREEN),
        ("vote", "n samples", ORANGE),
    ]
    picture.text(20, 322, "transformer", anchor="start", bold=True)
    picture.text(620, 322, "answer", anchor="end", bold=True)
    for i, (name, what, fill) in enumerate(steps):
        x = 14 + 125 * i
        picture.box(x, 342, 104, 44, name, fill, size=17)
        picture.text(x + 52, 404, what, size=15, colour=SOFT)
        if i:
            picture.arrow(x - 20, 364, x - 3, 364)
    picture.text(66, 434, "m1 convert", size=15, colour=SOFT)
    picture.text(191, 434, "m1 distill", size=15, colour=SOFT)
    picture.text(316, 434, "m1 sft", size=15, colour=SOFT)
    picture.text(441, 434, "m1 grpo", size=15, colour=SOFT)
    picture.text(566, 434, "m1 solve", size=15, colour=SOFT)
    picture.text(320, 462, "A few layers stay attention. MLPs, norms and embeddings are copied.", size=15, colour=SOFT)
    return picture


def slots() -> Picture:
    """Slots, forks, pages and the prefix cache."""
    picture = Picture(392, "A prompt is computed once; its samples are forks, and its states wait for the next prompt")
    picture.text(20, 26, "1. The prompt is computed once, into a slot.", anchor="start", bold=True)
    picture.box(20, 46, 200, 40, "prompt: 600 tokens", GREY)
    picture.arrow(224, 66, 276, 66)
    picture.box(284, 46, 150, 40, "slot 0: state", GREEN)
    picture.box(446, 46, 174, 40, "pages: keys, values", BLUE)
    picture.text(20, 122, "2. Each further sample is a fork.", anchor="start", bold=True)
    for i in range(1, 4):
        y = 100 + 46 * i
        picture.box(284, y, 150, 36, f"slot {i}: state", GREEN)
        picture.arrow(224, 164, 276, y + 18)
        picture.box(446, y, 84, 36, "own", BLUE)
    picture.box(20, 146, 200, 36, "copy the state", GREY)
    picture.box(20, 194, 200, 36, "share full pages", GREY)
    picture.arrow(224, 212, 276, 218, dashed=True)
    picture.text(580, 210, "pages for", size=15, colour=SOFT)
    picture.text(580, 228, "new tokens", size=15, colour=SOFT)
    picture.text(20, 306, "3. States after prompts stay: the prefix cache.", anchor="start", bold=True)
    picture.box(20, 326, 200, 40, "a prompt that begins so", GREY)
    picture.arrow(224, 346, 276, 346)
    picture.box(284, 326, 150, 40, "kept state", ORANGE)
    picture.text(446, 338, "only what is new", size=15, anchor="start", colour=SOFT)
    picture.text(446, 356, "is computed", size=15, anchor="start", colour=SOFT)
    return picture


def request() -> Picture:
    """A request's way through the engine."""
    picture = Picture(430, "A request's way: decide on integers, execute on tensors, update on the host")
    picture.box(20, 20, 130, 40, "text", GREY)
    picture.arrow(154, 40, 186, 40)
    picture.box(194, 20, 180, 40, "chat template, tokens", GREY)
    picture.arrow(378, 40, 410, 40)
    picture.box(418, 20, 202, 40, "Request: n Sequences", GREY)
    picture.arrow(519, 64, 519, 100)
    picture.text(20, 118, "every step", anchor="start", bold=True)
    picture.box(330, 106, 290, 58, "Scheduler.schedule: integers\nwho has a slot, which tokens", BLUE)
    picture.arrow(475, 168, 475, 196)
    picture.box(330, 202, 290, 58, "Executor.execute: tensors\nrestore, prefill, fork, decode, draw", GREEN)
    picture.arrow(475, 264, 475, 292)
    picture.box(330, 298, 290, 58, "Scheduler.update: the new tokens\nended sequences leave their slots", BLUE)
    picture.arrow(326, 327, 250, 327)
    picture.box(60, 302, 186, 50, "the next step", GREY)
    picture.arrow(153, 298, 153, 135, dashed=True)
    picture.arrow(153, 135, 326, 135, dashed=True)
    picture.arrow(475, 360, 475, 384)
    picture.box(330, 388, 290, 34, "ended: text, answer, vote", ORANGE)
    picture.text(240, 222, "on a GPU the next", size=15, colour=SOFT)
    picture.text(240, 240, "step starts before the", size=15, colour=SOFT)
    picture.text(240, 258, "tokens are read", size=15, colour=SOFT)
    return picture


def vote() -> Picture:
    """Samples that end, their answers, and the moment at which the vote is decided."""
    picture = Picture(
        352, "Seven samples vote; with four equal answers of seven the vote is decided and the rest is aborted"
    )
    picture.text(20, 26, "samples decoded together", anchor="start", bold=True)
    samples = [(150, "42"), (190, "42"), (230, "24"), (270, "84 / 2"), (320, "42"), (320, ""), (320, "")]
    for i, (end, answer) in enumerate(samples):
        y = 56 + 28 * i
        picture.bar(40, end, y, GREEN if answer in ("42", "84 / 2") else RED if answer else GREY, dashed=not answer)
        picture.text(end + 10, y, answer or "aborted", size=15, anchor="start", colour=INK if answer else SOFT)
    picture.arrow(40, 262, 400, 262)
    picture.text(404, 262, "seconds", size=15, anchor="start", colour=SOFT)
    picture.arrow(320, 300, 320, 268)
    picture.text(320, 314, "decided: two missing votes can't change it", size=15)
    picture.text(320, 334, "--rule decided, the default", size=15, colour=SOFT)
    picture.text(540, 26, "classes of answers", bold=True)
    picture.box(470, 50, 140, 56, "42 = 84 / 2\n4 votes", GREEN)
    picture.box(470, 120, 140, 56, "24\n1 vote", RED)
    picture.box(470, 190, 140, 40, "answer: 42", ORANGE)
    return picture


def main(pictures: Iterable) -> None:
    for draw in pictures:
        path, text = IMAGES / f"{draw.__name__}.svg", str(draw())
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                sys.exit(f"{path.name} isn't what docs/pictures.py draws: run it")
        else:
            path.write_text(text)


if __name__ == "__main__":
    main((overview, slots, request, vote))
