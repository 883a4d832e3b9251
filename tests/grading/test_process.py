r"""Invariant 8's second half: a worker that hangs, dies or talks nonsense costs one sample, and is counted.

Most workers here are stand-ins, which start faster than sympy does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1.errors import UserError
from m1.grading import Grader
from m1.grading import process as process_module
from m1.grading.process import GradingProcess

REAL = Path(process_module.__file__).with_name("worker.py")
PAIR = (r"\sqrt{2}", "7")  # the first needs a worker, and stand-ins read a 7 in it
OTHER = (r"\sqrt{3}", "7")
SEVEN = '[["7", ["", ""]]]'
FIRST_TIME = """
import json, os, pathlib, signal, sys, time
flag = pathlib.Path({flag!r})
first = not flag.exists()
flag.touch()
print("ready", flush=True)
for line in sys.stdin:
    if first:
        {misbehave}
    print({seven!r}, flush=True)
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replaces the worker's script."""

    def replace(code):
        script = tmp_path / "worker.py"
        script.write_text(code)
        monkeypatch.setattr(Path, "with_name", lambda self, name: script)

    return replace


@pytest.mark.parametrize(
    ("misbehave", "fate"),
    [
        ("time.sleep(600)", "timeout"),
        ("print('[[', end='', flush=True); time.sleep(600)", "timeout"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "crash"),
        ("sys.exit()", "crash"),
        ("print('seven, I think', flush=True)", "crash"),
        ("print('7', flush=True)", "crash"),
        ("print('[7]', flush=True)", "crash"),
        ("print('[]', flush=True)", "crash"),
        ("print('\\n\\n', flush=True)", "crash"),
        ("os.write(1, bytes(100_000))", "crash"),
        ("os.write(1, bytes([255, 10]))", "crash"),
        ("print('null', flush=True); continue", "error"),
    ],
)
def test_misbehaviour_costs_one_answer(stand_in, tmp_path, misbehave, fate):
    stand_in(FIRST_TIME.format(flag=str(tmp_path / "flag"), misbehave=misbehave, seven=SEVEN))
    with Grader(timeout=1.0) as grader:
        assert not grader.equal(*PAIR)
        if fate == "error":
            grader.close()  # the next one is another process
        grader.timeout = 30.0
        assert grader.equal(*OTHER)
        assert not grader.equal(*PAIR)  # known: not asked again
        assert not grader.equal(PAIR[0], "8") and grader.partition([PAIR[0], "7", "8"]) == [0, 1, 2]
        assert grader.counts == {"graded": 2, "timeout": 0, "crash": 0, "error": 0} | {fate: 1}


def test_a_tower_of_powers_costs_its_timeout():
    with Grader(timeout=1.0) as grader:
        grader.start()
        texts = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{0.25}"]
        assert grader.grade_texts(texts, [["7"], [r"\frac{\sqrt{4}}{8}"]]) == [False, True]
        assert grader.counts["timeout"] + grader.counts["crash"] == 1


def test_no_answer_is_wrong_because_no_worker_starts(monkeypatch):
    monkeypatch.setattr(process_module.sys, "executable", "/bin/false")
    with Grader() as grader:
        grader.start()
        assert grader.equal("1/2", "0.5")  # needs none
        with pytest.raises(UserError, match="2 grading processes didn't start"):
            grader.equal(*PAIR)


SLOW_FIRST_TIME = """
import pathlib, time
flag = pathlib.Path({flag!r})
first = not flag.exists()
flag.touch()
if first: time.sleep(600)
print("ready", flush=True)
for _ in open(0): print({seven!r}, flush=True)
"""


def test_a_slow_start_is_no_wrong_answer(stand_in, monkeypatch, tmp_path):
    """Starting has its own clock, and is tried again."""
    monkeypatch.setattr(process_module, "STARTUP_SECONDS", 1.0)
    stand_in(SLOW_FIRST_TIME.format(flag=str(tmp_path / "flag"), seven=SEVEN))
    with Grader(timeout=0.5) as grader:
        assert grader.equal(*PAIR) and len(grader._idle) == 1
        assert grader.counts == {"graded": 1, "timeout": 0, "crash": 0, "error": 0}


def test_a_worker_killed_while_idle_costs_one_answer():
    with Grader() as grader:
        assert grader.equal(r"\frac{\sqrt{1}}{2}", "0.5")
        os.kill(grader._idle[0].process.pid, signal.SIGKILL)
        assert not grader.equal(r"\frac{\sqrt{1}}{3}", "1/3")
        assert grader.counts["crash"] == 1
        assert grader.equal(r"\frac{\sqrt{1}}{4}", "0.25")


def test_an_interrupted_worker_is_not_asked_again(stand_in, monkeypatch):
    """Its late reply would be taken for the next pair's."""
    stand_in(f"print('ready', flush=True)\nfor _ in open(0): print({SEVEN!r}, flush=True)")

    def interrupt(self, *arguments):
        raise KeyboardInterrupt

    with Grader() as grader:
        grader.start()
        process = grader._idle[0].process
        monkeypatch.setattr(GradingProcess, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            grader.equal(*PAIR)
        assert not grader._idle and process.poll() is not None


def test_a_worker_that_starts_again_late_overruns_no_budget(stand_in):
    """It goes on starting meanwhile, and is asked when it is ready."""
    stand_in(
        f"import time; time.sleep(1.0)\nprint('ready', flush=True)\nfor _ in open(0): print({SEVEN!r}, flush=True)"
    )
    with Grader() as grader:
        before = time.monotonic()
        assert not grader.equal(*PAIR, within=0.2)
        assert time.monotonic() - before < 0.9
        (worker,) = grader._idle
        assert grader.equal(*PAIR) and grader._idle == [worker]  # not remembered as unequal
        assert grader.counts == {"graded": 2, "timeout": 1, "crash": 0, "error": 0}


def test_an_answer_that_had_too_little_time_is_asked_again(stand_in):
    stand_in(
        f"import time\nprint('ready', flush=True)\nfor _ in open(0): time.sleep(0.5); print({SEVEN!r}, flush=True)"
    )
    with Grader() as grader:
        grader.start()
        (worker,) = grader._idle
        assert not grader.equal(*PAIR, within=0.1)
        assert worker.process.poll() is not None and not grader._idle  # it owed a reply
        assert grader.equal(*PAIR)


def test_a_worker_that_never_starts_is_given_up(stand_in, monkeypatch):
    monkeypatch.setattr(process_module, "STARTUP_SECONDS", 0.3)
    stand_in("import time; time.sleep(600)")
    with Grader() as grader:
        assert not grader.equal(*PAIR, within=0.1)  # it had no time to start, and is compared as a text
        with pytest.raises(UserError, match="didn't start within"):
            grader.equal(*PAIR)
        assert not grader._idle


def test_workers_are_replaced_after_some_gradings(stand_in, monkeypatch):
    stand_in(f"print('ready', flush=True)\nfor _ in open(0): print({SEVEN!r}, flush=True)")
    monkeypatch.setattr(process_module, "ANSWERS_PER_WORKER", 2)
    with Grader() as grader:
        grader.start()
        first = grader._idle[0].process
        assert grader.equal(*PAIR) and grader._idle[0].process is first
        assert grader.equal(*OTHER) and not grader._idle and first.poll() is not None
        assert grader.equal(r"\sqrt{5}", "7") and grader.counts["crash"] == 0


def test_several_workers_grade_at_a_time(stand_in, tmp_path):
    """Each of these waits for two to have been asked. Equal rows are graded once."""
    stand_in(
        f"import os, pathlib, sys, time\nfolder = pathlib.Path({str(tmp_path)!r})\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n    (folder / f'{os.getpid()}.asked').touch()\n"
        "    while len(list(folder.glob('*.asked'))) < 2: time.sleep(0.01)\n"
        f"    print({SEVEN!r}, flush=True)"
    )
    with Grader(timeout=20.0, workers=2) as grader:
        texts = [r"\boxed{\sqrt{2}}", r"\boxed{\sqrt{3}}", "no answer", r"\boxed{\sqrt{2}}"]
        assert grader.grade_texts(texts, [["7"]] * 4) == [True, True, False, True]
        assert grader.counts == {"graded": 2, "timeout": 0, "crash": 0, "error": 0}


@pytest.mark.skipif(sys.platform != "linux", reason="not every system has /proc")
def test_a_worker_inherits_no_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Grader() as grader:
        grader.start()
        environment = Path(f"/proc/{grader._idle[0].process.pid}/environ").read_bytes()
        assert environment == b"PYTHONHASHSEED=0\0"
        assert grader.equal(r"\sqrt{4}", "2") and grader.counts["graded"] == 1


def real_worker(changes):
    """The real script's module with changes, as code."""
    return f"import sys\nsys.path.insert(0, {str(REAL.parent)!r})\nimport worker as w\n{changes}\nw.main()"


@pytest.mark.skipif(sys.platform != "linux", reason="not every system limits memory")
def test_a_workers_memory_is_limited(stand_in):
    stand_in(real_worker("w.reply_to = lambda answer: (bytearray(4 << 30), [['7', ['', '']]])[1]"))
    with Grader() as grader:
        assert not grader.equal(*PAIR)
        assert grader.counts["crash"] == 1


def test_what_a_library_prints_is_no_reply(stand_in):
    stand_in(real_worker("w.reply_to = lambda answer: (print('null', flush=True), [['8', ['', '']]])[1]"))
    with Grader() as grader:
        assert not grader.equal(*PAIR) and not grader.equal(*OTHER)
        assert grader.counts == {"graded": 2, "timeout": 0, "crash": 0, "error": 0}


def test_a_busy_worker_ends_without_its_parent():
    code = real_worker("w.ALARM_AFTER = 0.1\nw.reply_to = lambda answer: str(9**9**9)")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        process.stdin.write(json.dumps(["1", 0.2]).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == -signal.SIGALRM


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "pass"])
def test_idle_workers_end_with_their_parent(end):
    code = (
        "import os, signal\nfrom m1.grading import Grader\ngrader = Grader()\ngrader.start()\n"
        f"print(grader._idle[0].process.pid, flush=True)\n{end}"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    """Zombies, which nobody may be there to reap, are dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
