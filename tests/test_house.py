"""The rules of the house: which room may import which, and that the README's table is the committed result."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "m1"
ABOVE_ENGINE = ("trl", "datasets", "m1.train", "m1.evaluation", "m1.bench", "m1.peers")
FORBIDDEN = {
    "ops": (*ABOVE_ENGINE, "transformers", "m1.model", "m1.engine", "m1.reasoning"),
    "model": (*ABOVE_ENGINE, "m1.engine", "m1.reasoning"),
    "engine": (*ABOVE_ENGINE, "m1.reasoning"),
    "reasoning": ABOVE_ENGINE,
    "peers": ("trl", "datasets", "m1.engine", "m1.train", "m1.evaluation", "m1.bench"),
    "evaluation": ("trl", "m1.train", "m1.bench"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_downward(room):
    for path in (SOURCES / room).glob("**/*.py"):
        for name in imports(path):
            for forbidden in FORBIDDEN[room]:
                assert name != forbidden and not name.startswith(forbidden + "."), f"{path.name} imports {name}"


def test_the_scheduler_knows_integers_alone():
    tensors = {"torch", "numpy", "m1.engine.executor", "m1.engine.runner", "m1.engine.state"}
    assert not tensors & set(imports(SOURCES / "engine" / "scheduler.py"))


def test_the_package_imports_without_the_trainers():
    code = (
        "import sys; sys.modules['trl'] = sys.modules['datasets'] = None;"
        "import m1, m1.model, m1.ops, m1.engine; print(m1.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_conversion_tables_are_the_committed_results():
    conversion = runpy.run_path(str(ROOT / "benchmarks" / "conversion.py"))
    text = (ROOT / "docs" / "training.md").read_text()
    alignment, layers = (
        json.loads((ROOT / f"results/{name}.json").read_text()) for name in ("alignment", "layer_choice")
    )
    for measured in alignment["head_dim"].values():
        assert conversion["alignment_table"](measured) in text
    assert conversion["layers_table"](layers) in text


def test_tables_are_the_committed_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
