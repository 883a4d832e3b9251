"""Outputs have owners: settings, locks, torn lines, drafts and what makes room for what."""

import errno
import json
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from m1.errors import UserError
from m1.outputs import make_room, refuse_sources, set_aside
from m1.runs import BOOKKEEPING, Run, finished, new_folder, refuse_foreign

SETTINGS = {"model": "a", "sampling": {"seed": 0, "temperature": 0.7}}
HOLDER = """
import sys, time
from m1.runs import Run
with Run("eval", sys.argv[1], {}) as run:
    run.append("rows.jsonl", {"id": 0})
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def out(tmp_path):
    return tmp_path / "o"


def rows(out, command="eval", settings=SETTINGS, finish=True, **options):
    """Makes a run with one row."""
    with Run(command, out, settings, **options) as run:
        run.append(out.name if options.get("is_file") else "rows.jsonl", {"id": 0})
        if finish:
            run.finish()


def content(folder):
    """Every file's bytes and every link's target, without locks: what must not change."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path.name != ".lock"
    }


def refused(enter, *words):
    """One line with these words."""
    with pytest.raises(UserError) as error, enter:
        pass
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# Run: whose the folder is


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (SETTINGS | {"model": "b"}, "model=a, now b"),
        (SETTINGS | {"sampling": {"seed": 1, "temperature": 0.7}}, "sampling.seed=0, now 1"),
        (SETTINGS | {"sampling": {"seed": 0}}, "sampling.temperature=0.7, now None"),
        (SETTINGS | {"data_sha256": "1f"}, "data: not the same"),
        (SETTINGS | {"model": "a" * 99}, "model: not the same"),
    ],
    ids=str,
)
def test_other_settings_are_named(out, changed, difference, finish):
    rows(out, finish=finish)
    before = content(out)
    refused(Run("eval", out, changed), str(out), "`m1 eval` output of other settings", f"({difference})", "--force")
    assert content(out) == before


def test_other_commands_output(out):
    rows(out)
    before = content(out)
    refused(Run("budget", out, SETTINGS), "holds `m1 eval` output")
    assert content(out) == before


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "n"},
        {"inside/notes.txt": "n"},
        {"settings.json": '{"editor.tabSize": 4}'},
        {"settings.json": "not JSON"},
        {"settings.json": '{"command": 5}', "rows.jsonl": '{"id": 0}'},
        {"manifest.json": '{"name": "an extension"}'},
        {"manifest.json": '{"command": "eval"}'},
        {"seconds.json": "[]"},
        {"rows.jsonl": '{"id": 0}'},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_file", [False, True])
def test_foreign_files(out, files, is_file):
    folder = out.with_name("o.run") if is_file else out
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = content(out.parent)
    first = min(files).split("/")[0]
    refused(Run("eval", out, {}, is_file=is_file), "holds files that aren't `m1 eval` output", first)
    assert content(out.parent) == before and not (folder / ".lock").exists()
    rows(out, is_file=is_file, force=True)
    assert content(out.parent / f"{folder.name}.replaced") == content_of(files)


def content_of(files):
    return {name: text.encode() for name, text in files.items()}


def test_a_foreign_file_where_the_output_should_be(out):
    out.write_text("notes without a newline")
    for is_file in (False, True):
        refused(Run("generate", out, {}, is_file=is_file), "exists and isn't `m1 generate` output")
    assert content(out.parent) == {"o": b"notes without a newline"}
    out.unlink()
    out.mkdir()
    refused(Run("generate", out, {}, is_file=True), "isn't `m1 generate` output")


@pytest.mark.parametrize("place", ["/", ".", ".."])
def test_places_without_a_name(place, tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "notes.txt").write_text("n")
    monkeypatch.chdir(tmp_path / "inside")
    before = content(tmp_path)
    for is_file in (False, True):
        with pytest.raises(UserError):
            refuse_foreign("eval", place, is_file)
    refused(new_folder("convert", place, {}))
    assert content(tmp_path) == before


def test_an_empty_place_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder("convert", ".", {}) as folder:
        (folder / "weights").write_text("w")
    assert (tmp_path / "weights").read_text() == "w"


def test_a_users_file_in_a_runs_folder_is_kept(out):
    rows(out, finish=False)
    (out / "mine.txt").write_text("m")
    with Run("eval", out, SETTINGS) as run:
        run.clear("rows.jsonl", "checkpoints")
        assert run.begun and not (out / "rows.jsonl").exists()
    assert (out / "mine.txt").read_text() == "m"


def test_a_run_through_a_link(tmp_path, out):
    (tmp_path / "disk").mkdir()
    out.symlink_to(tmp_path / "disk")
    rows(out)
    assert out.is_symlink() and (tmp_path / "disk" / "manifest.json").exists()
    rows(out, force=True)
    assert os.readlink(tmp_path / "o.replaced") == str(tmp_path / "disk") and not out.is_symlink()


# Run: the lock


@pytest.fixture
def holder(out):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_holds_the_lock(out, holder):
    before = content(out)
    for options in ({}, {"force": True}, {"resume": False}):
        refused(Run("eval", out, {}, **options), f"{out} is in use by another process")
    refused(Run("eval", out, {"a": 1}, force=True), "in use")
    refused(new_folder("convert", out, {}, force=True), "in use")
    assert content(out.parent) == {f"o/{name}": data for name, data in before.items()}
    holder.kill()
    holder.wait()
    with Run("eval", out, {}) as run:
        assert run.begun and run.read("rows.jsonl", {"id": int}) == [{"id": 0}]


def test_this_process_holds_the_lock(out):
    with Run("eval", out, {}) as run:
        refused(Run("eval", out, {}), "in use by another process")
        run.append("rows.jsonl", {"id": 0})
    with Run("eval", out, {}) as run:
        assert run.begun


def test_a_draft_of_another_process(out):
    with new_folder("convert", out, {}) as folder:
        (folder / "weights").write_text("w")
        refused(new_folder("convert", out, {}), "in use by another process")
    assert (out / "weights").read_text() == "w"


# Run: what it reads and writes


def test_a_torn_line_is_repaired_in_own_files_only(out):
    rows(out, finish=False)
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"id": 1, "te')
    with Run("eval", out, SETTINGS) as run:
        assert run.read("rows.jsonl", {"id": int}) == [{"id": 0}]
    assert (out / "rows.jsonl").read_text() == '{"id": 0}\n'
    foreign = out.with_name("foreign.jsonl")
    foreign.write_text('{"id": 0}\n{"id": 1, "te')
    refused(Run("generate", foreign, {}, is_file=True), "isn't `m1 generate` output")
    assert foreign.read_text() == '{"id": 0}\n{"id": 1, "te'


def test_a_row_without_a_key(out):
    rows(out, finish=False)
    with Run("eval", out, SETTINGS) as run, pytest.raises(UserError, match=r"rows.jsonl, line 1: has no 'text'"):
        run.read("rows.jsonl", {"id": int, "text": str})


def test_the_manifest_is_written_last(out, monkeypatch):
    with Run("eval", out, SETTINGS) as run:
        run.append("rows.jsonl", {"id": 0})
        assert not finished("eval", out, SETTINGS)
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
            patch.setattr("pathlib.Path.replace", no_space)
            run.finish()
        assert not (out / "manifest.json").exists() and (out / "settings.json").exists()
        run.finish()
    assert finished("eval", out, SETTINGS) and not (out / "seconds.json").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"] == SETTINGS and manifest["command"] == "eval" and manifest["versions"]["torch"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_finished(out):
    assert not finished("eval", out, SETTINGS)
    rows(out)
    assert finished("eval", out, SETTINGS) and finished("eval", out, {"model": "a"})
    with pytest.raises(UserError, match=r"other settings \(model=a, now b\)"):
        finished("eval", out, {"model": "b"})
    with pytest.raises(UserError, match="holds finished `m1 eval` output"):
        finished("budget", out, SETTINGS)


def test_secrets_are_not_stored(out, monkeypatch):
    secrets = {"A_KEY": "sesame-open-now", "B_TOKEN": 'quote"and\\slash', "C_SECRET": "pässwörter", "D_KEY": "10000000"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    rows(out, settings={"values": list(secrets.values()), "url": "http://me:pw@host/v1?api_key=12", "seed": 10_000_000})
    for name in ("settings.json", "manifest.json"):
        stored = json.loads((out / name).read_text())
        stored = stored.get("settings", stored)
        assert stored["values"] == ["***"] * 4 and stored["seed"] == 10_000_000
        assert stored["url"] == "http://***@host/v1?api_key=***"


# Run: force, and leaving nothing


def test_force_moves_aside(out):
    rows(out)
    first = content(out)
    rows(out, settings={"model": "b"}, force=True)
    assert content(out.with_name("o.replaced")) == first
    rows(out, settings={"model": "b"}, force=True)  # a finished one, although the settings are the same
    assert json.loads((out.with_name("o.replaced-2") / "settings.json").read_text())["model"] == "b"
    assert (out / "rows.jsonl").read_text() == '{"id": 0}\n'


def test_force_resumes_an_unfinished_run_of_the_same_settings(out):
    rows(out, finish=False)
    with Run("eval", out, SETTINGS, force=True) as run:
        assert run.begun and run.read("rows.jsonl", {}) == [{"id": 0}]
    assert [path.name for path in out.parent.iterdir()] == ["o"]


@pytest.mark.parametrize("is_file", [False, True])
def test_a_run_that_made_nothing_leaves_nothing(out, is_file):
    with pytest.raises(KeyboardInterrupt), Run("eval", out, {}, is_file=is_file) as run:
        (run.folder / "checkpoints" / "empty").mkdir(parents=True)
        (run.folder / ".manifest.json.part").write_text("{")
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_was_there_stays(out):
    (out / "inside").mkdir(parents=True)
    with pytest.raises(ValueError), Run("eval", out, {}):
        raise ValueError
    assert {path.name for path in out.iterdir()} - {".lock"} == {"inside"}


def test_seconds_add_up_over_sessions(out):
    for _ in range(2):
        with Run("eval", out, {}) as run:
            run.append("rows.jsonl", {})
            run._opened -= 10
    assert 20 <= json.loads((out / "seconds.json").read_text())["seconds"] < 30
    with Run("eval", out, {}) as run:
        run.finish()
    assert 20 <= json.loads((out / "manifest.json").read_text())["seconds"] < 30


def test_the_folder_of_an_output_file(out):
    rows(out, "generate", is_file=True)
    assert out.read_text() == '{"id": 0}\n' and (out.with_name("o.run") / "manifest.json").exists()
    assert {path.name for path in out.parent.iterdir()} == {"o", "o.run"}
    assert {path.name for path in out.with_name("o.run").iterdir()} <= BOOKKEEPING
    refused(Run("generate", out, {"model": "b"}, is_file=True), "model=a, now b")
    out.unlink()
    assert not finished("generate", out, {"model": "b"}, is_file=True)
    with Run("generate", out, {"model": "b"}, is_file=True) as run:  # nothing is left that could be lost
        assert not run.begun and not run.finished and run.read("o", {}) == []
        run.append("o", {"id": 1})
    assert out.read_text() == '{"id": 1}\n' and not (out.with_name("o.run") / "manifest.json").exists()


def test_output_deleted_but_for_the_manifest(out):
    rows(out)
    (out / "rows.jsonl").unlink()
    with Run("eval", out, {"model": "b"}) as run:
        assert not run.begun and not run.finished


# new_folder


@pytest.fixture
def old(out):
    """An output that must stay."""
    out.mkdir()
    (out / "weights").write_text("old")
    return content(out)


ERRORS = {
    "exception": (ValueError("a bug"), ValueError),
    "interrupt": (KeyboardInterrupt(), KeyboardInterrupt),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), UserError),
    "full disk, safetensors": (SafetensorError("I/O error: No space left on device"), UserError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaves_the_old_output(out, old, name):
    error, shown = ERRORS[name]
    with pytest.raises(shown) as raised, new_folder("convert", out, {}, force=True) as folder:
        (folder / "weights").write_text("half")
        assert content(out) == old
        raise error
    if shown is UserError:
        assert "can't write to" in str(raised.value) and "No space left" in str(raised.value)
    assert content(out) == old and [path.name for path in out.parent.iterdir()] == ["o"]


def test_a_full_disk_at_the_end(out, old, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):  # noqa: SIM117
        with new_folder("convert", out, {}, force=True) as folder:
            (folder / "weights").write_text("new")
            patch.setattr("m1.runs.write_json", no_space)
    assert content(out) == old and [path.name for path in out.parent.iterdir()] == ["o"]


def test_a_new_folder_replaces_only_by_force(out, old):
    refused(new_folder("convert", out, {}), f"{out} holds weights", "--force")
    assert content(out.parent) == {"o/weights": b"old"}
    with new_folder("convert", out, {"a": 1}, force=True) as folder:
        (folder / "weights").write_text("new")
    assert content(out.with_name("o.replaced")) == old and (out / "weights").read_text() == "new"
    assert finished("convert", out, {"a": 1}) and not (out / ".lock").exists()
    refused(new_folder("convert", out, {}), "holds finished `m1 convert` output")


def test_a_draft_of_a_killed_process_is_replaced(out):
    part = out.with_name(".o.part")
    rows(part, "convert", {"other": "settings"}, finish=False)
    with new_folder("convert", out, {}) as folder:
        assert not (folder / "rows.jsonl").exists()
        (folder / "weights").write_text("w")
    assert not part.exists() and not (out / "rows.jsonl").exists() and (out / "weights").exists()


@pytest.mark.parametrize("name", ["notes.txt", "settings.json"])
def test_a_folder_that_looks_like_a_draft_is_kept(out, name):
    part = out.with_name(".o.part")
    part.mkdir()
    (part / name).write_text("{}")
    refused(new_folder("convert", out, {}), ".o.part holds files that aren't `m1 convert` output")
    assert content(out.parent) == {f".o.part/{name}": b"{}"}
    (part / name).unlink()
    part.rmdir()
    part.write_text("a file")
    refused(new_folder("convert", out, {}), ".o.part exists")
    assert part.read_text() == "a file"


def test_empty_folders_hold_nothing(out):
    (out / "empty" / "folders").mkdir(parents=True)
    with new_folder("convert", out, {}) as folder:
        (folder / "weights").write_text("w")
    assert (out / "weights").exists() and not (out / "empty").exists()


def test_links(tmp_path, out, old):
    (tmp_path / "link").symlink_to(out)
    refused(new_folder("convert", tmp_path / "link", {}), "link holds weights")
    refused(new_folder("convert", tmp_path / "link", {}, [out], force=True), "the source itself")
    with new_folder("convert", tmp_path / "link", {}, force=True) as folder:
        (folder / "weights").write_text("new")
    assert content(out) == old and os.readlink(tmp_path / "link.replaced") == str(out)
    assert (tmp_path / "link" / "weights").read_text() == "new" and not (tmp_path / "link").is_symlink()

    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to(tmp_path / "empty")
    with new_folder("convert", tmp_path / "to-empty", {}) as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "to-empty").is_symlink() and (tmp_path / "empty" / "weights").exists()

    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(new_folder("convert", tmp_path / "dangling", {}), "dangling holds")
    assert os.readlink(tmp_path / "dangling") == str(tmp_path / "nowhere")


def test_sources(tmp_path, monkeypatch):
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    for place in (tmp_path / "a" / "model", tmp_path / "a", tmp_path, "model", ".", "../link/model", "/"):
        for force in (False, True):
            refused(new_folder("convert", place, {}, [tmp_path / "a" / "model"], force), "is the source itself")
    refuse_sources(tmp_path / "a" / "model" / "eval", [tmp_path / "a" / "model"])
    refuse_sources(tmp_path / "a" / "mode", [tmp_path / "a" / "model"])


# Single files


def test_each_old_output_gets_the_first_free_name(tmp_path):
    path, names = tmp_path / "a.json", ["a.json.replaced", "a.json.replaced-2", "a.json.replaced-3"]
    (tmp_path / names[1]).symlink_to(tmp_path / "nowhere")  # a name in use, although nothing exists there
    for content, name in (("first", names[0]), ("second", names[2])):
        path.write_text(content)
        assert set_aside(path) == tmp_path / name and not path.exists()
        assert (tmp_path / name).read_text() == content


def test_room_for_a_file(tmp_path):
    path, mark = tmp_path / "new" / "a.json", ("command", "solve")
    make_room(path, "solve", mark)
    path.write_text('{"command": "solve"}')
    make_room(path, "solve", mark)
    assert path.exists()
    for text in ('{"command": "other"}', "notes", "", "[]", '{"command": "sol'):
        path.write_text(text)
        with pytest.raises(UserError, match="exists and isn't a result of `m1 solve`"):
            make_room(path, "solve", mark)
        assert path.read_text() == text
    with pytest.raises(UserError, match=r"a.json exists: choose another file"):
        make_room(path, "inspect")
    make_room(path, "solve", mark, force=True)
    assert [path.name for path in path.parent.iterdir()] == ["a.json.replaced"]
    for force in (False, True):
        with pytest.raises(UserError, match="isn't a regular file"):
            make_room(tmp_path / "new", "solve", mark, force)
        with pytest.raises(UserError, match="can't write"):
            make_room(path.parent / "a.json.replaced" / "b.json", "solve", mark, force)


def test_other_ranks_of_a_run_neither_lock_nor_write(tmp_path, monkeypatch):
    """What torchrun starts opens one output many times."""
    with Run("sft", tmp_path / "o", {"a": 1}, ranks=True) as first:
        first.append("rows.jsonl", {"b": 1})
        before = sorted(path.name for path in (tmp_path / "o").iterdir())
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(UserError, match="in use"), Run("sft", tmp_path / "o", {"a": 1}):
            pass  # only training knows ranks
        with Run("sft", tmp_path / "o", {"a": 1}, ranks=True) as second:
            assert second.begun and not second.finished and second.seconds >= 0
            second.append("rows.jsonl", {"b": 2})
            second.clear()
            second.finish()
        assert sorted(path.name for path in (tmp_path / "o").iterdir()) == before
        assert second.read("rows.jsonl", {"b": int}) == [{"b": 1}]


def test_a_draft_that_another_command_left_is_in_nobodys_way(tmp_path):
    with Run("convert", tmp_path / ".o.part", {"a": 1}) as killed:
        (killed.folder / "model.safetensors").write_bytes(b"half")
    with new_folder("import-official", tmp_path / "o", {"b": 2}) as folder:
        assert not (folder / "model.safetensors").exists()
    assert (tmp_path / "o" / "manifest.json").exists() and not (tmp_path / ".o.part").exists()
