"""The command line, as tests of bad input see it."""

import pytest
from commands import m1


@pytest.fixture
def run(capsys):
    """Runs `m1 ...` in this process; returns (exit code, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        return m1(*arguments), capsys.readouterr().err

    return run
