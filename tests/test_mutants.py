"""The list of mutations fits the code, and the script tells survivors from the killed."""

import pytest
from mutants import MUTANTS, ROOT, Mutant, survivors


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.why}")
def test_a_mutation_changes_what_is_there_and_names_tests(mutant):
    text = (ROOT / "src" / "m1" / mutant.file).read_text()
    assert text.count(mutant.original) == 1
    assert mutant.mutated != mutant.original
    assert all((ROOT / "tests" / test).is_file() for test in mutant.tests.split())


@pytest.fixture
def tree(tmp_path):
    for name in ("src/m1", "tests"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "src/m1/__init__.py").write_text("")
    (tmp_path / "src/m1/one.py").write_text("def larger(a, b):\n    return a if a > b else b\n")
    (tmp_path / "tests/test_one.py").write_text("from m1.one import larger\n\ndef test(): assert larger(2, 1) == 2\n")
    return tmp_path


def test_survivors_are_told_from_the_killed(tree, capsys):
    killed = Mutant("one.py", "a > b", "a < b", "test_one.py", "the smaller one")
    equal = Mutant("one.py", "a > b", "a >= b", "test_one.py", "no difference")
    assert survivors([killed, equal], tree) == [equal]
    assert capsys.readouterr().out == "killed   one.py: the smaller one\nSURVIVED one.py: no difference\n"
    assert "a > b" in (tree / "src/m1/one.py").read_text()


def test_a_lost_text_and_a_broken_suite_end_it(tree):
    with pytest.raises(SystemExit, match="has 'c > d' 0 times, not once"):
        survivors([Mutant("one.py", "c > d", "", "test_one.py", "")], tree)
    (tree / "tests/test_one.py").write_text("def test(): assert False\n")
    with pytest.raises(SystemExit, match="fail without any mutation"):
        survivors([Mutant("one.py", "a > b", "a < b", "test_one.py", "")], tree)
