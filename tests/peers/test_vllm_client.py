"""What a worker says, and what becomes of it: with a stand-in, which speaks the protocol and needs no environment."""

import sys

import pytest
from checkpoints import tiny_teacher

from m1.errors import UserError
from m1.peers import vllm_client
from m1.peers.vllm_client import start_vllm

START = 'import json, sys\nprint(json.dumps({"ready": True, "versions": {"vllm": "0"}}), flush=True)\n'


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
    with start_vllm(tiny_teacher(), 64, 4) as (ask, versions):
        assert versions == {"vllm": "0"}
        answer = ask({"batch": 3})
        assert answer["work"] == {"batch": 3}
        assert answer["of"] == ["--dtype", "float32", "--max-len", "64", "--max-seqs", "4"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('print(\'{"error": "no such model"}\')', "vllm: no such model"),
        ("raise SystemExit(1)", "it ended without an answer"),
        (START, "it ended without an answer"),
        (START + 'for line in sys.stdin: print(json.dumps({"error": "too long"}), flush=True)', "vllm: too long"),
    ],
)
def test_what_it_cannot_do_is_one_line(stand_in, code, message):
    stand_in(code)
    with pytest.raises(UserError, match=message), start_vllm(tiny_teacher(), 64, 4) as (ask, _):
        ask({"batch": 3})


def test_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_client, "PYTHON", tmp_path / "python")
    with pytest.raises(UserError, match="make peers"), start_vllm(tiny_teacher(), 64, 4):
        pass
