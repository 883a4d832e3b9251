"""The command line in this process."""

import sys

from m1 import cli


def m1(*arguments):
    """Runs `m1 ...` and returns its exit code."""
    argv, sys.argv = sys.argv, ["m1", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as exit_:
        return exit_.code or 0
    finally:
        sys.argv = argv
    raise AssertionError("main ends by exiting")


def check(result, *words):
    """Asserts that (exit code, stderr) are those of bad input: one line, with these words."""
    code, err = result
    assert code == 2, err
    assert "Traceback" not in err
    message = [line for line in err.splitlines() if line.startswith("m1: ")]
    assert len(message) == 1, err
    for word in words:
        assert word in message[0], message[0]
