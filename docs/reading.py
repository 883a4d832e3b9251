"""How hard the documentation is to read, and turns of phrase that it avoids.

python docs/reading.py [FILE.md ...]    # measures of each page; exit code 1 at an avoided turn or a too long sentence

`words.txt` beside this file lists the turns, each with what to write instead.
"""

import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG = 30  # words; sentences beyond are counted
TOO_LONG = 40  # words; sentences beyond are refused
CODE = re.compile(r"^(```|~~~).*?^\1\s*$|(?<=\n\n)(?: {4}[^\n]*\n)+", re.MULTILINE | re.DOTALL)
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|al|vs|etc|cf|no|eq|approx)\.$", re.IGNORECASE)


def pages() -> list[Path]:
    """All pages: at the root, in docs/, and of the recipes."""
    return [path for pattern in ("*.md", "docs/**/*.md", "recipes/**/README.md") for path in sorted(ROOT.glob(pattern))]


def paragraphs(text: str) -> list[str]:
    """The prose of a page: no code blocks, tables, headings, comments, link targets or images."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*(\|.*|#+ .*|:::.*|!!!.*|---+)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<[^>]+>", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    return [" ".join(block.split()) for block in blocks if block.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a page. A list item is at least one."""
    found = []
    for paragraph in paragraphs(text):
        begun = ""
        for part in re.split(
            r"(?<=[.!?])[\"*)]*\s+(?=[A-Z0-9`\"*(\[]|vLLM|llama)", re.sub(r"^(?:[-*]|\d+\.) ", "", paragraph)
        ):
            begun = f"{begun} {part}".strip()
            if not ABBREVIATION.search(begun):
                found.append(begun)
                begun = ""
        found += [begun] if begun else []
    return found


def words(sentence: str) -> int:
    """The words of a sentence; code between backticks is one."""
    return len(re.findall(r"[\w'./-]*\w[\w'./%-]*", re.sub(r"`[^`]*`", "code", sentence)))


def avoided() -> list[tuple[re.Pattern, str]]:
    """The turns of words.txt and what to write instead."""
    lines = (Path(__file__).parent / "words.txt").read_text().splitlines()
    pairs = [line.split(" -> ", 1) for line in lines if line.strip() and not line.startswith("#")]
    return [(re.compile(rf"\b{turn.strip()}\b", re.IGNORECASE), instead.strip()) for turn, instead in pairs]


def faults(text: str) -> list[str]:
    """What the check refuses in a page."""
    prose = sentences(text)
    found = [f"{words(s)} words: {s}" for s in prose if words(s) > TOO_LONG]
    for sentence in prose:
        plain = re.sub(r"`[^`]*`", "", sentence)
        found += [f"{m[0]!r} -> {instead}: {sentence}" for turn, instead in avoided() for m in turn.finditer(plain)]
    return found


def measures(text: str) -> dict[str, float]:
    """Sentences, their mean length, how many are long, and code blocks."""
    lengths = [words(sentence) for sentence in sentences(text)] or [0]
    return {
        "sentences": len(lengths),
        "mean": statistics.mean(lengths),
        "long": sum(length > LONG for length in lengths),
        "code": len(CODE.findall(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))),
    }


def main(files: list[Path]) -> int:
    row = "{:<34}{:>10}{:>14}{:>10}{:>13}"
    print(row.format("page", "sentences", "mean length", f"over {LONG}", "code blocks"))
    total = {"sentences": 0, "words": 0.0, "long": 0, "code": 0}
    refused = []
    for path in files:
        text = path.read_text()
        m = measures(text)
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        print(row.format(name, m["sentences"], f"{m['mean']:.1f}", m["long"], m["code"]))
        total = {key: total[key] + m.get(key, m["sentences"] * m["mean"]) for key in total}
        refused += [f"{name}: {fault}" for fault in faults(text)]
    mean = total["words"] / max(1, total["sentences"])
    print(row.format(f"{len(files)} pages", total["sentences"], f"{mean:.1f}", total["long"], total["code"]))
    print("\n".join(refused), file=sys.stderr)
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main([Path(name).resolve() for name in sys.argv[1:]] or pages()))
