"""The documentation: every command in it parses and runs, made small; links, pictures and words are checked.

A comment before a block says how it is treated:

    <!-- not run: why -->    its commands must parse, but aren't run
    <!-- gpu -->             the same: benchmarks/gpu.sh runs it. <!-- cluster -->: it needs several hosts
    <!-- real -->            Python on a published model: tests/real runs it
    <!-- server -->          Python against a server, which is started for it
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import save_checkpoint, scramble, tiny_teacher
from commands import m1
from gguf_files import gguf_teacher, write_gguf
from typer.main import get_command

from m1.cli import app
from m1.model import M1ForCausalLM
from m1.recipe import load_stage

ROOT = Path(__file__).parents[1]
READING = runpy.run_path(str(ROOT / "docs" / "reading.py"))
PAGES = READING["pages"]()
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
ELSEWHERE = {"bench": "tests/bench", "serve": "tests/serve"}  # commands that those tests run
SMALLER = {  # options of commands: the most that is given here
    "--n": 2, "--max-new-tokens": 4, "--seconds": 0.3, "--limit": 1,
}  # fmt: skip
ADDED = {
    "--max-new-tokens": "4",
    "--limit": "1",
    "--seeds": "1",
    "--max-num-seqs": "4",
}  # where a command has them and the page doesn't give them
LAYERS = {"3,8,13,18,23,27": "1,3"}  # the tiny teacher has four
STAGES = {
    "align": 'teacher = "teacher"\nmodel = "hybrid"',
    "align-all": 'teacher = "teacher"\nmodel = "all"',
    "choose-layers": 'teacher = "teacher"\nmodel = "runs/align-all"\nkeep = 2',
    "distill": 'teacher = "teacher"\nmodel = "hybrid"\nforward_kl_steps = 1',
    "sft": 'model = "hybrid"',
    "grpo": 'model = "hybrid"',
}
TRAINER = {
    "grpo": "num_generations = 2\nper_device_train_batch_size = 2\nsteps_per_generation = 1\nmax_completion_length = 4",
}


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    number: int
    language: str
    mark: str
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}-{self.number}"

    def commands(self):
        """Its commands, as lists of words."""
        lines = self.text.replace("\\\n", " ").splitlines()
        split = (shlex.split(line, comments=True) for part in lines for line in part.split("&&"))
        return [words for words in split if words]


def blocks(*languages):
    """The blocks of all pages in one of the languages."""
    found = []
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match["language"] in languages:
                found.append(Block(page, number, match["language"], match["mark"] or "", match["text"]))
    return found


SHELL = blocks("sh")
RUN = [block for block in SHELL if not re.match("not run|gpu|cluster", block.mark)]
PYTHON = [block for block in blocks("python") if not re.match("not run|real", block.mark)]


def click_command(words):
    """The command line's own description of a command, its name, and the words after it."""
    command, name = get_command(app), "m1"
    while words and hasattr(command, "get_command"):
        if name == "m1 eval" and words[0].startswith("-"):
            words = ["run", *words]
        inner = command.get_command(None, words[0])
        assert inner, f"{name} has no command {words[0]}"
        command, name, words = inner, f"{name} {words[0]}", words[1:]
    return command, name, words


def options(command):
    """The names of a command's options."""
    return {name for parameter in command.params for name in parameter.opts}


def smaller(words):
    """The words of an m1 command, for tiny models."""
    command, _, _ = click_command(words[1:])
    words = [LAYERS.get(word, word) for word in words[1:]]
    for option, most in SMALLER.items():
        if option in words:
            words[words.index(option) + 1] = str(min(most, float(words[words.index(option) + 1])))
    for option, value in ADDED.items():
        if option in options(command) and option not in words:
            words += [option, value]
    return [word.removesuffix(".0") for word in words]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with what the pages' commands name."""
    folder = tmp_path_factory.mktemp("docs")
    save_checkpoint(tiny_teacher(), folder / "teacher")
    shutil.copytree(folder / "teacher", folder / "Llama-3.2-3B-Instruct")
    shutil.copytree(folder / "teacher", folder / "smollm2")
    write_gguf(folder / "FILE.gguf", gguf_teacher())
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert m1("convert", "--teacher", "teacher", "--out", "hybrid", "--attention-ratio", "0.25") == 0
    for name in ("OUT", "OTHER", "distilled", "runs/pocket/grpo"):
        shutil.copytree(folder / "hybrid", folder / name)
        (folder / name / "manifest.json").unlink(missing_ok=True)
        scramble(M1ForCausalLM.from_pretrained(folder / name)).save_pretrained(folder / name)
    sums = [(f"{i} + {i}?", str(2 * i)) for i in range(3)]
    files = {
        "math500.jsonl": [{"id": str(i), "problem": p, "answer": a} for i, (p, a) in enumerate(sums)],
        "problems.jsonl": [{"id": str(i), "problem": p} for i, (p, a) in enumerate(sums)],
        "sums.jsonl": [{"nr": i, "q": p, "gold": a} for i, (p, a) in enumerate(sums)],
        "worked.jsonl": [{"problem": p, "solution": rf"\boxed{{{a}}}", "answer": a} for p, a in sums],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage, settings in STAGES.items():
        trainer = TRAINER.get(stage, "per_device_train_batch_size = 2")
        (folder / f"{stage}.toml").write_text(
            f'stage = "{stage.removesuffix("-all")}"\nout = "runs/{stage}"\n{settings}\n'
            f'[data]\npath = "worked.jsonl"\n[trainer]\nmax_steps = 1\n{trainer}\n'
        )
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name in ("hybrid", "distilled"):
            command = "eval --task math500 --data math500.jsonl --n 2 --max-new-tokens 4 --model"
            assert m1(*command.split(), name) == 0
    return folder


@pytest.fixture
def sandbox(made, tmp_path, monkeypatch):
    """A copy of it, as the working folder."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is 2+2?\n")))
    return tmp_path / "here"


def test_results_with_times_name_their_machine():
    for path in (ROOT / "results").glob("*.json"):
        text = path.read_text()
        if re.search(r'"\w*(seconds|per_second)\w*"', text):
            assert re.search(r'"(cpu|gpu|machine)": "', text), f"{path.name} doesn't say what machine it is of"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_say_their_language(page):
    """A block that is only indented would be seen by no test."""
    text = re.sub(r"^```\w+\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    if page.name != "CONTRIBUTING.md":  # its map is no code
        assert "```" not in text and not re.search(r"\n\n {4}\S", text)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_parse(block):
    for words in block.commands():
        match words[0]:
            case "m1":
                command, name, rest = click_command(words[1:])
                command.make_context(name, list(rest), resilient_parsing=False)
            case "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            case "python" if words[1].endswith(".py"):
                assert (ROOT / words[1]).exists()
            case script if "/" in script and not script.startswith("."):
                text = (ROOT / script).read_text()
                assert all(f"\n  {part}" in text or f"| {part})" in text for part in words[1:])
            case _:
                assert re.match("not run|gpu|cluster", block.mark), f"nothing runs {words}"


@pytest.mark.long
@pytest.mark.parametrize("block", RUN, ids=str)
def test_commands_run(block, sandbox, capsys):
    for words in block.commands():
        if words[0] == "m1" and words[1] not in ELSEWHERE:
            code = m1(*smaller(words))
            assert code == 0, f"{words}: {capsys.readouterr().err}"


@pytest.mark.long
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block, sandbox, monkeypatch):
    text = block.text
    if block.mark != "server":
        exec(compile(text, str(block), "exec"), {})
        return
    monkeypatch.syspath_prepend(ROOT / "tests" / "serve")
    from serving import Running

    from m1.engine import LLM

    server = Running(LLM.from_pretrained("OUT", max_num_seqs=8, max_model_len=512), [], max_n=64)
    try:
        text = (
            text.replace("http://127.0.0.1:8000", server.url)
            .replace('"OUT"', '"small"')
            .replace('{"n": 64, "seconds": 20}', '{"n": 1}, "max_tokens": 4')
        )
        exec(compile(text, str(block), "exec"), {})
    finally:
        server.close()


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_stages_are_valid(block, tmp_path):
    if not block.text.startswith("stage"):
        block_text = f'stage = "grpo"\nmodel = "m"\nout = "o"\n{block.text}\n[data]\npath = "d"\n'
    else:
        block_text = block.text
    (tmp_path / "stage.toml").write_text(block_text)
    assert load_stage(tmp_path / "stage.toml")


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        path = (page.parent / target).resolve() if target else page
        if target == "changelog.md":
            continue
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor.replace("_", "") in {a.replace("_", "") for a in anchors(path)}, f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_language(page):
    assert READING["faults"](page.read_text()) == [], "docs/reading.py has the rules, docs/words.txt the words"


def test_the_language_check_finds_what_it_should():
    long = " ".join(["word"] * 50)
    assert len(READING["faults"](f"It goes on where it was. {long}.\n\n```sh\ngoes on where\n```\n")) == 2
    measured = READING["measures"](f"One two three. Four five.\n\n{long}\n\n```sh\nls\n```\n")
    assert measured["sentences"] == 3 and measured["long"] == 1 and measured["code"] == 1


def test_pictures_are_drawn_by_the_script():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "pictures.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", sorted({path.parent.name for path in ROOT.glob("recipes/*/*.toml")}))
def test_a_recipe_says_how_it_is_run(recipe):
    """And how long it takes, or that nobody has run it."""
    page = (ROOT / "recipes" / recipe / "README.md").read_text()
    assert "```sh\n" in page and re.search(r"minutes|hours|\d s\b|not run|hasn't been run", page, re.IGNORECASE)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert all(f": {page.name}" in navigation for page in PAGES if page.parent.name == "docs")
