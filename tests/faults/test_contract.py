"""One contract: bad input and I/O errors end in one line with the value and the fix, and exit code 2."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest
from commands import check

from m1 import cli
from m1.cli import render
from m1.errors import UserError
from m1.jsonl import parse_json, read_json, read_jsonl
from m1.recipe import EvalStage, load_stage
from m1.text import CONTROL, clean


def command(*words, **options):
    """`m1 ...` in a process of its own: what Python itself prints at its end counts, too."""
    return subprocess.run([sys.executable, "-m", "m1", *words], capture_output=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x.bin"), ["/data/x.bin", "No space left"]),
        (OSError(errno.EROFS, "Read-only file system", "out/y"), ["out/y", "Read-only"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), ["nnn", "too long"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["the output", "No space left"]),
        (PermissionError("odd"), ["odd"]),
    ],
    ids=str,
)
def test_any_io_error_names_its_file(run, monkeypatch, tmp_path, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("m1.model.summary.summarize", fail)
    check(run("inspect", tmp_path), *words)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at x.cpp:1] DefaultCPUAllocator: can't allocate memory: 5 bytes\nframe #0"),
        RuntimeError("Storage size calculation overflowed with sizes=[5]"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
    ],
    ids=repr,
)
def test_memory_that_is_not_there(run, monkeypatch, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("m1.model.summary.summarize", fail)
    check(run("inspect", tmp_path), "not enough memory", "give smaller sizes")


def test_a_panic_of_rust_code(run, monkeypatch, tmp_path):
    """What a tokenizer raises on some texts is no Exception."""

    def fail(*_, **__):
        raise type("PanicException", (BaseException,), {})("index out of bounds")

    monkeypatch.setattr("m1.model.summary.summarize", fail)
    check(run("inspect", tmp_path), "index out of bounds", "tokenizer.json")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_io_error_in_a_thread_is_one_line(run, monkeypatch, tmp_path):
    """TensorBoard writes in a thread of its own."""

    def fail(*_, **__):
        thread = threading.Thread(target=open, args=(tmp_path / "missing",))
        thread.start()
        thread.join()
        raise UserError("ended")

    monkeypatch.setattr("threading.excepthook", threading.excepthook)
    monkeypatch.setattr("m1.model.summary.summarize", fail)
    code, err = run("inspect", tmp_path)
    assert code == 2 and "Traceback" not in err and f"m1: can't read or write {tmp_path}/missing: No such file" in err


def test_a_reader_that_leaves_and_a_full_disk_behind_the_output(tmp_path):
    (tmp_path / "settings.json").write_text('{"command": "sft"}')
    reading, writing = os.pipe()
    os.close(reading)
    code = "import os, signal; signal.signal(signal.SIGPIPE, signal.SIG_IGN); from m1.cli import main; main()"
    gone = subprocess.run([sys.executable, "-c", code, "runs", tmp_path], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (gone.returncode, gone.stderr) == (1, b"")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "m1", "runs", tmp_path], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr == b"m1: can't read or write the output: No space left on device\n"


def test_arguments_that_are_not_text():
    done = command("runs", b"\xff")
    assert done.returncode == 2 and done.stderr.startswith(b"m1: the argument") and done.stderr.count(b"\n") == 1


def test_a_terminal_without_the_character(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    words = [sys.executable, "-c", "from m1.cli import main; main()", "runs", str(tmp_path / "\u00b1")]
    done = subprocess.run(words, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"isn't a folder" in done.stderr


BAD_JSON = {
    "deep": '{"a": ' + "[" * 100_000,
    "deep and closed": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "long number": '{"a": ' + "1" * 5000 + "}",
    "half a character": r'{"a": "\ud800"}',
    "half a character as a key": r'{"\udfff": 1}',
    "cut": '{"a": ',
    "empty": "",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json(tmp_path, name):
    path = tmp_path / "x.json"
    path.write_text(BAD_JSON[name])
    with pytest.raises(ValueError, match=r"^.*$"):
        parse_json(BAD_JSON[name])
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(path)
    if BAD_JSON[name]:
        with pytest.raises(UserError, match=r"x\.json, line 1: "):
            list(read_jsonl(path))


def test_whole_characters_pass():
    assert parse_json(r'{"a": "\ud83d\ude00 \\ud800"}') == {"a": "\U0001f600 \\ud800"}


@pytest.mark.parametrize("names", ["half", "deep", "long number"])
@pytest.mark.parametrize("task", ["generate", "rank-layers", "eval"])
def test_hostile_rows(run, teacher_dir, tmp_path, task, names):
    texts = {"half": r'{"problem": "\ud800", "answer": "1", "solution": "1"}'}
    (tmp_path / "d.jsonl").write_text((texts | BAD_JSON)[names] + "\n")
    words = {
        "generate": ("generate", "--model", teacher_dir, "--prompts"),
        "rank-layers": ("rank-layers", "--teacher", teacher_dir, "--data"),
        "eval": ("eval", "--model", teacher_dir, "--task", "own", "--data"),
    }[task]
    check(run(*words, tmp_path / "d.jsonl", "--out", tmp_path / "o"), "d.jsonl, line 1: ")


@pytest.mark.parametrize(
    "line",
    [
        "n = " + "1" * 5000,
        "temperature = 1" + "0" * 400,
        "temperature = 1" + "0" * 4000,
        "seed = 2026-01-01",
        r'out = "a\u0000b"',
        "models = " + "[" * 5000,
        'out = "\udcff"',
        "n = {}",
        "stage = {}",
    ],
    ids=lambda line: line[:20],
)
def test_toml(tmp_path, line):
    path = tmp_path / "x.toml"
    keys = {"stage": '"eval"', "out": '"o"', "models": '{x = "m"}'}
    keys.pop(line.split(" ")[0], None)
    text = "".join(f"{key} = {value}\n" for key, value in keys.items()) + line
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"x\.toml") as error:
        load_stage(path)
    assert len(str(error.value)) < 600


NAMES = ["../../x", "..", ".", "", "_hidden", "$x^$", "[/x]", "{x}", "a b", "a\nb", "a/b", "\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_models_and_stages(run, tmp_path, name):
    with pytest.raises(UserError, match=r"\[models\]"):
        EvalStage(out="o", models={name: "m"})
    quoted = json.dumps(name)
    (tmp_path / "pipeline.toml").write_text(f'name = "x"\nout = "x"\nstages = [{quoted}]\n')
    check(run("pipeline", tmp_path), "stages", "a name begins with")


HOSTILE = ["[/x]", "[bold]x", "{x}", "{0}", "%s", "\x1b]0;title\x07", "\x1b[2Jx", "\x9b2J", "a\rb", "\u202egpj", "$x^$"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("to", ["console", "errors"])
def test_text_is_only_text_in_both_consoles(monkeypatch, capsys, to, text):
    monkeypatch.setattr(render, to, type(render.console)(stderr=to == "errors", markup=False, highlight=False))
    render.line(text, to=getattr(render, to))
    with render.progress_bar(text, text) as on_progress:
        on_progress(1, 2)
    render.error(text)
    shown = "".join(capsys.readouterr())
    assert not CONTROL.search(shown) and clean(text).strip() in shown


def test_a_message_is_one_line(capsys):
    render.error("a\nb\n\n c")
    assert capsys.readouterr().err == "m1: a b c\n"


def test_a_fault_of_the_program_is_still_a_traceback(run, monkeypatch, tmp_path):
    monkeypatch.setattr("m1.model.summary.summarize", lambda *_: 1 / 0)
    code, err = run("inspect", tmp_path)
    assert code == 1 and "ZeroDivisionError" in err and cli.BAD_INPUT == 2
