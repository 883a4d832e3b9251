"""Servers with a small hybrid, on free ports."""

import pytest
from serving import KEY, Running

from m1.engine import LLM


@pytest.fixture(scope="module")
def llm(hybrid_dir):
    return LLM.from_pretrained(hybrid_dir, max_num_seqs=8, max_model_len=512)


@pytest.fixture(scope="module")
def apart(hybrid_dir):
    """The same model with an engine of its own, which no server's thread steps."""
    return LLM.from_pretrained(hybrid_dir, max_num_seqs=8, max_model_len=512)


@pytest.fixture(scope="module")
def server(llm):
    made = Running(llm, [KEY])
    yield made
    made.close()


@pytest.fixture
def serve(llm):
    """Starts a server with other options; its engine is the module's."""
    made = []

    def start(keys=(), **options):
        made.append(Running(llm, list(keys), **options))
        return made[-1]

    yield start
    for one in made:
        one.close()
