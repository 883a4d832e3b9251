"""Fixtures of the kernels' tests."""

import importlib.util

import pytest
import torch
from kernels import TRITON_DEVICE

if TRITON_DEVICE == "cpu" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.repair()


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
