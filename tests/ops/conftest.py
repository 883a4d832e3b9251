"""Fixtures of the kernels' tests."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
