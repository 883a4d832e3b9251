"""What a worker says, and what becomes of it: with a stand-in, which speaks the protocol and needs no environment."""

import gc
import importlib.util
import os
import sys
import time
import weakref
from pathlib import Path

import pytest
from checkpoints import tiny_teacher

from m1.errors import UserError
from m1.peers import vllm_client, worker
from m1.peers.vllm_client import find_python, start_vllm

START = 'import json, sys\nprint(json.dumps({"ready": True, "versions": {"vllm": "0"}, "settings": {}}), flush=True)\n'


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replaces the worker."""

    def replace(code):
        (tmp_path / "worker.py").write_text(code)
        monkeypatch.setattr(vllm_client, "PYTHON", type(tmp_path)(sys.executable))
        monkeypatch.setattr(vllm_client, "WORKER", tmp_path / "worker.py")

    return replace


def test_work_goes_out_and_comes_back(stand_in):
    stand_in(
        START + 'for line in sys.stdin: print(json.dumps({"work": json.loads(line), "of": sys.argv[2:]}), flush=True)'
    )
    with start_vllm(tiny_teacher(), 64, 4) as ask:
        answer = ask({"batch": 3})
        assert answer["work"] == {"batch": 3}
        assert answer["of"] == ["--device", "cpu", "--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('print(\'{"error": "no such model"}\')', "vllm: no such model"),
        ("raise SystemExit('out of memory')", "the worker ended without an answer: out of memory"),
        (START + "print('gone', file=sys.stderr)", "the worker ended without an answer: gone"),
        (START + 'for line in sys.stdin: print(json.dumps({"error": "too long"}), flush=True)', "vllm: too long"),
    ],
)
def test_what_it_cannot_do_is_one_line(stand_in, code, message):
    stand_in(code)
    with pytest.raises(UserError, match=message), start_vllm(tiny_teacher(), 64, 4) as ask:
        ask({"batch": 3})


def test_one_that_died_while_idle(stand_in):
    stand_in(START)
    with pytest.raises(UserError, match="the worker ended without an answer"), start_vllm(tiny_teacher(), 64, 4) as ask:
        time.sleep(0.5)
        ask({"batch": 3})


def test_one_that_does_not_end_is_killed(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "ENDS_WITHIN", 0.2)
    stand_in(START + f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    with start_vllm(tiny_teacher(), 64, 4):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_which_python_has_vllm(monkeypatch, tmp_path):
    this, given, peers = Path(sys.executable), tmp_path / "given", tmp_path / "peers"
    peers.touch()
    monkeypatch.setattr(vllm_client, "PYTHON", peers)
    assert (find_python(None, "cpu"), find_python(None, "cuda")) == (peers, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert (find_python(None, "cpu"), find_python(None, "cuda")) == (peers, this)
    peers.unlink()
    assert find_python(None, "cpu") == this
    with pytest.raises(UserError, match=f"--vllm-python {given}: no such file"):
        find_python(str(given), "cpu")
    given.touch()
    assert find_python(str(given), "cpu") == find_python(str(given), "cuda") == given


def test_a_model_is_freed_once_it_is_copied(stand_in):
    """On a GPU the worker needs its memory."""
    stand_in(START)
    models = [tiny_teacher()]
    alive = weakref.ref(models[0])
    with start_vllm(models.pop(), 64, 4) as ask:
        gc.collect()
        assert alive() is None and ask.versions == {"vllm": "0"}


def test_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_client, "PYTHON", tmp_path / "python")
    with pytest.raises(UserError, match="make peers"), start_vllm(tiny_teacher(), 64, 4):
        pass
