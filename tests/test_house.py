"""The rules of the house: which room may import which, and that the README's table is the committed result."""

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import m1

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "m1"

# Folders and files of src/m1 from top to bottom. Each may import what is further down, and nothing beside or above it.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"pipeline", "doctor"},
    {"train", "evaluation", "serve", "bench"},
    {"reasoning"},
    {"engine"},
    {"plugins"},
    {"peers"},
    {"model"},
    {"ops"},
    {"recipe"},
    {"data_options", "sampling_options"},
    {"tasks", "layer_choice", "history"},
    {"grading", "runs"},
    {"outputs"},
    {"jsonl", "plots", "machine"},
    {"hub", "text"},
    {"options", "progress", "secrets"},
    {"errors"},
]
# These may import less than that.
ONLY = {
    "bench": {"engine", "peers", "model", "ops", "outputs", "jsonl", "plots", "options", "machine", "errors"},
    "plugins": {"model", "ops", "errors"},
    "peers": {"errors"},
    "ops": {"options", "errors"},
}
# Rooms that are imported at once: they need no heavy library.
LIGHT = ("grading", "recipe", "data_options", "sampling_options", "runs", "options")
# Libraries that a room does without. Anything that is printed is the command line's.
WITHOUT = {
    "ops": {"transformers", "trl", "datasets"},
    "model": {"trl", "datasets"},
    "engine": {"trl", "datasets"},
    "reasoning": {"trl", "datasets"},
    "evaluation": {"trl"},
    "tasks": {"torch", "transformers", "trl"},
    **{name: {"torch", "transformers", "trl", "datasets"} for name in LIGHT},
}
PRINTING = {"rich", "typer"}


def imports(path):
    """Every module that a file imports anywhere in it, also for type checking alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "m1":
            yield from (f"m1.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def rooms():
    """Name -> files, of every folder and file of src/m1 but `__init__`, which is a lazy list of names."""
    files = {}
    for path in SOURCES.glob("**/*.py"):
        name = path.relative_to(SOURCES).parts[0].removesuffix(".py")
        files.setdefault(name, []).append(path)
    del files["__init__"]
    return files


def test_every_room_has_a_floor_and_a_place_on_the_map():
    names = set(rooms())
    assert names <= set().union(*FLOORS)
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for name in names - {"__main__"}:
        entry = f"src/m1/{name}/" if (SOURCES / name).is_dir() else f"src/m1/{name}.py"
        assert entry in contributing, f"CONTRIBUTING.md doesn't say what {entry} is for"


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_point_downward(room):
    floor = next(i for i, names in enumerate(FLOORS) if room in names)
    allowed = ONLY.get(room, set().union(*FLOORS[floor + 1 :])) | {room}
    for path in rooms()[room]:
        for name in imports(path):
            library, *parts = name.split(".")
            if name == "m1":
                continue
            if library == "m1":
                assert parts[0] in allowed, f"{path.name} of {room} imports {name}"
            else:
                forbidden = WITHOUT.get(room, set()) | (set() if room == "cli" else PRINTING)
                assert library not in forbidden, f"{path} imports {name}"


def calls(path):
    """(the called name's last part, the call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def test_no_code_comes_with_data():
    """Checkpoints are loaded without their own code, pickles as tensors only, and trainers' arguments never."""
    loads = 0
    for path in SOURCES.glob("**/*.py"):
        text = path.read_text()
        assert "training_args.bin" not in text and "import dill" not in text
        for name, call in calls(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            owner = ast.unparse(call.func)
            if name in ("from_pretrained", "from_config") and owner.split(".")[0].startswith("Auto"):
                assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
                loads += 1
            if owner == "torch.load":
                assert given.get("weights_only") == "True", f"{path}:{call.lineno}"
                loads += 1
            assert owner not in ("pickle.load", "pickle.loads", "eval", "exec") or "shapes.py" in path.name, path
    assert loads >= 6


def test_the_scheduler_knows_integers_alone():
    tensors = {"torch", "numpy", "m1.engine.executor", "m1.engine.runner", "m1.engine.slots"}
    for name in ("scheduler.py", "plan.py"):
        assert not tensors & set(imports(SOURCES / "engine" / name))


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.long
def test_the_package_imports_without_the_trainers():
    done = python(
        "import sys; sys.modules['trl'] = sys.modules['datasets'] = None;"
        "import m1, m1.model, m1.ops, m1.engine; print(m1.__all__)"
    )
    assert done.returncode == 0, done.stderr


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['matplotlib'] = None;"
        "import m1.grading.audit, m1.tasks.benchmarks; from m1.cli import main; sys.argv[0] = 'm1'; main()"
    )
    for command in ([], ["convert"], ["eval", "run"], ["sft"], ["bench", "decode"], ["solve"], ["generate"]):
        done = python(code, *command, "--help")
        assert done.returncode == 0 and "Usage: m1" in done.stdout, done.stderr
    module = subprocess.run([sys.executable, "-m", "m1", "--help"], capture_output=True, text=True)
    assert module.returncode == 0 and "convert" in module.stdout, module.stderr


PROBED = "import m1, importlib.util; assert importlib.util.find_spec('transformers'); import transformers"


@pytest.mark.parametrize("order", [PROBED, pytest.param("import transformers, m1", marks=pytest.mark.long)])
def test_import_m1_registers_it_with_transformers(order):
    """Whichever comes first; and `import m1` alone imports neither torch nor transformers."""
    code = (
        "import sys; import m1; assert not {'torch', 'transformers'} & set(sys.modules); del sys.modules['m1'];"
        "sys.meta_path.pop(0);" + order + ";"
        "from transformers import AutoConfig, AutoModelForCausalLM;"
        "config = AutoConfig.for_model('m1', vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2,"
        " num_attention_heads=2, num_key_value_heads=1, layer_types=['linear_attention', 'full_attention']);"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__, m1.M1Config is type(config))"
    )
    done = python(code)
    assert done.stdout == "M1ForCausalLM True\n", done.stderr


def test_every_public_name_is_there():
    assert all(getattr(m1, name).__doc__ for name in m1.__all__) and set(m1.__all__) <= set(dir(m1))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        m1.nothing  # noqa: B018


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


@pytest.mark.parametrize("name", ["lock", "dev", "test", "docs"])
def test_locks_have_hashes(name):
    """pip checks every file that it installs, and users get no development tools."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    pinned = [entry for entry in text.replace("\\\n", "").splitlines() if entry and not entry.startswith("#")]
    assert pinned and all("==" in entry and "--hash=sha256:" in entry for entry in pinned)
    if name == "lock":
        tools = {"pytest", "mypy", "ruff", "pre-commit", "hypothesis", "pytest-xdist"}
        assert not tools & {entry.partition("==")[0].strip() for entry in pinned}


def test_the_makefile_has_its_supply_chain():
    done = subprocess.run(
        ["make", "-n", "-B", "locks", "sbom", "fuzz", "docs"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout
        for word in ("--generate-hashes", "cyclonedx", "--require-hashes", "tests/fuzz", "mkdocs build --strict")
    )
    renew = (ROOT / ".ci/renew-locks").read_text()
    assert all(word in renew for word in ("checkout -B renew-locks", "make locks", ".ci/run"))


def test_torch_and_httpx2_have_upper_bounds():
    for name in ("torch", "httpx2"):
        assert re.search(rf'"{name}>=[\d.]+,<[\d.]+"', (ROOT / "pyproject.toml").read_text())
