"""The built wheel works outside the repository: it holds the kernels' sources, the pages and its type information."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ["py.typed", "ops/cpu/*.cpp", "ops/cpu/*.h", "evaluation/*.html", "serve/*.html"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the working tree, without the network."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # setuptools writes build/ and egg-info beside the sources
    source.mkdir()
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_has_every_file_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "m1").rglob("*.py")}
    data = {str(path.relative_to(ROOT / "src")) for pattern in DATA for path in (ROOT / "src" / "m1").glob(pattern)}
    assert len(data) >= 15
    assert {name for name in names if ".dist-info/" not in name} == sources | data


def test_the_wheel_declares_its_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert all(f"Provides-Extra: {extra}\n" in text for extra in ("gpu", "vllm", "serve", "dev"))
    assert "Classifier: Typing :: Typed" in text


@pytest.mark.long
def test_the_wheel_converts_and_solves(wheel, tmp_path, teacher_dir):
    """In an empty folder, from the unpacked wheel: its own kernels, compiled into an empty cache."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "M1_CACHE": str(tmp_path / "cache")}

    def m1(*arguments):
        command = [sys.executable, "-m", "m1", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "convert" in m1("--help")
    assert f"from {tmp_path / 'site' / 'm1'}" in m1("doctor")
    assert "2 attention layers" in m1("convert", "--teacher", teacher_dir, "--out", "hybrid", "--keep-attention", "1,3")
    assert "answer:" in m1("solve", "2+2", "--model", "hybrid", "--n", 2, "--max-new-tokens", 4)
    assert list((tmp_path / "cache" / "kernels").glob("*.so"))


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_dockerfiles_copy_what_is_there(name):
    """No daemon builds them in the tests: what they copy exists, and .dockerignore lets it through."""
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert len(copied) == 6
    assert all((ROOT / source).exists() and source in allowed for source in copied)
    assert "USER m1" in text and 'ENTRYPOINT ["m1"]' in text
