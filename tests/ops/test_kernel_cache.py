"""The cache of compiled kernels: where it is, whose it is, and that nothing damaged or foreign is loaded from it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1.ops import build


@pytest.fixture
def compiler(tmp_path):
    """A compiler that takes no time: it counts its calls and copies kernels that exist already."""
    kernels = build.load_cpu_kernels()
    assert kernels
    script = tmp_path / "a compiler"
    copy = f'while [ "$1" != -o ]; do shift; done; cp {shlex.quote(kernels._name)} "$2"'
    script.write_text(f"#!/bin/sh\necho >> {shlex.quote(str(tmp_path))}/calls\n{copy}\n")
    script.chmod(0o755)
    return script


@pytest.fixture
def load(tmp_path, compiler, monkeypatch):
    """Loads the kernels as a new process does; returns their file."""
    monkeypatch.setenv("M1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", shlex.quote(str(compiler)))

    def load():
        build.load_cpu_kernels.cache_clear()
        kernels = build.load_cpu_kernels()
        return kernels and Path(kernels._name)

    yield load
    build.load_cpu_kernels.cache_clear()


def calls(tmp_path):
    return (tmp_path / "calls").read_text().count("\n")


@pytest.mark.parametrize("own", [None, "", ".", "m1", "../x"])
@pytest.mark.parametrize("xdg", [None, "", ".", "cache"])
@pytest.mark.parametrize("home", ["/home/me", None])
def test_empty_and_relative_settings_are_ignored(monkeypatch, own, xdg, home):
    for name, value in (("M1_CACHE", own), ("XDG_CACHE_HOME", xdg), ("HOME", home)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if home is None:  # and no entry in passwd
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    found = build.cache_dir()
    assert found.is_absolute() and found == Path("/home/me/.cache/m1" if home else f"/tmp/m1-{os.getuid()}")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"M1_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/m1"),
        ({"M1_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/m1"),
    ],
)
def test_absolute_settings_hold(monkeypatch, settings, expected):
    for name in ("M1_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert build.cache_dir() == Path(expected)


def test_the_folder_is_private(load, tmp_path):
    (tmp_path / "cache" / "kernels").mkdir(parents=True, mode=0o777)
    (tmp_path / "cache" / "kernels").chmod(0o777)
    assert load().parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", ["another user's", "a link"])
def test_a_folder_of_others_is_not_used(load, tmp_path, monkeypatch, how):
    if how == "a link":
        (tmp_path / "theirs").mkdir()
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "kernels").symlink_to(tmp_path / "theirs")
    else:
        load()
        monkeypatch.setattr(build.os, "getuid", lambda: 4711)
    with pytest.warns(UserWarning, match=r"isn't this user's own folder: set \$M1_CACHE"):
        assert load() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:50],
        lambda data: b"",
        lambda data: b"text",
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        None,
    ],
)
@pytest.mark.parametrize("which", ["library", "hash"])
def test_what_is_damaged_is_built_again(load, tmp_path, damage, which):
    library = load()
    whole = library.read_bytes()
    path = library if which == "library" else build._hash_file(library)
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    assert load() == library and library.read_bytes() == whole and calls(tmp_path) == 2
    assert load() == library and calls(tmp_path) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_library_is_built_again(load, tmp_path):
    library = load()
    os.chown(library, 4711, 4711)
    assert load().stat().st_uid == 0 and calls(tmp_path) == 2


def test_the_compiler_is_split_like_a_shell(load, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"env A=1 {shlex.quote(str(compiler))} -m64")
    assert load() and calls(tmp_path) == 1


@pytest.mark.parametrize("variable", ["CXX", "M1_CXXFLAGS"])
def test_an_odd_quote_is_a_warning(load, monkeypatch, variable):
    monkeypatch.setenv(variable, "g++ 'x")
    with pytest.warns(UserWarning, match="No closing quotation"):
        assert load() is None


@pytest.mark.long
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_compilation_leaves_nothing_for_long(load, compiler, tmp_path, kill):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    code = "from m1.ops.build import load_cpu_kernels; load_cpu_kernels()"
    environment = os.environ | {"CXX": str(slow)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    folder = tmp_path / "cache" / "kernels"
    while not list(folder.glob("tmp*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(kill)
    process.wait()
    assert load() and not list(folder.glob("tmp*"))
