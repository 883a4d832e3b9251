"""Fuzz tests: random inputs until their time is over. $M1_FUZZ_SECONDS is that of all together, 20 by default.

A run begins with another seed each time, which a failure prints: `M1_FUZZ_SEED=N make fuzz` repeats it.
"""

import os
import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings

from m1.model.tokenizer import time_limit

sys.path += [str(Path(__file__).parents[1] / room) for room in ("ops", "evaluation", "serve")]  # for their helpers

KINDS = 7
EXAMPLES = 10  # per seed
LONGEST = 30.0  # seconds of one input; what takes longer hangs
SECONDS = float(os.environ.get("M1_FUZZ_SECONDS", 20)) / KINDS
SEED = int(os.environ.get("M1_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


@pytest.fixture
def fuzz(record_property, capsys):
    """`fuzz(strategy, test)` calls `test` with examples of the strategy until its time is over."""

    def run(strategy, test):
        ends, count = time.monotonic() + SECONDS, 0

        def counted(example):
            nonlocal count
            count += 1
            started = time.monotonic()
            with time_limit(LONGEST):
                test(example)
            assert time.monotonic() - started < LONGEST, "it hangs"

        number = SEED
        while count == 0 or time.monotonic() < ends:
            try:
                seed(number)(SETTINGS(given(strategy)(counted)))()
            except BaseException:
                print(f"fuzz: repeat it with M1_FUZZ_SEED={number}")
                raise
            number += 1
        with capsys.disabled():
            print(f"\nfuzz: {count} inputs from seed {SEED}: {test.__name__}", end="")

    return run
