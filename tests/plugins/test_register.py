"""How vLLM learns of M1's models, with a stand-in for vLLM."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from m1.peers.vllm_client import plugin_path
from m1.plugins.vllm import TESTED, register

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "warns"), [("0.25.1", False), ("0.32.0+cpu", False), ("0.24.9", True), ("0.33.0", True)]
)
def test_registers_by_name_and_warns_of_other_versions(monkeypatch, caplog, version, warns):
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version, ModelRegistry=registry))
    register()
    assert registered == {"M1ForCausalLM": "m1.plugins.vllm.model:M1ForCausalLM"}
    assert (f"0.25 to 0.32, not {version}" in caplog.text) == warns


def test_the_tested_versions_are_those_of_the_extra():
    low, high = re.search(r'"vllm>=0\.(\d+),<0\.(\d+)"', PYPROJECT).groups()
    assert ((0, int(low)), (0, int(high) - 1)) == TESTED


def test_an_environment_without_m1_gets_its_entry_point(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert plugin_path(tmp_path) == {"PYTHONPATH": f"{tmp_path}:/elsewhere"}
    (entry,) = tmp_path.glob("*.dist-info/entry_points.txt")
    group, line = entry.read_text().split("\n")[:2]
    assert group == "[vllm.general_plugins]" and f'[project.entry-points."{group[1:-1]}"]' in PYPROJECT
    assert line.replace("= ", '= "') + '"' in PYPROJECT
    assert (tmp_path / "m1/plugins/vllm/__init__.py").exists() and not (tmp_path / "torch").exists()
