"""What the kernels' tests share: the backends, where they run, and the lengths that have broken kernels before."""

import pytest
import torch

# On a machine without a GPU, Triton's interpreter runs its kernels on the CPU, slowly (tests/conftest.py).
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 500, 1025]
INTERPRETED_LENGTHS = [1, 3, 33]

BACKENDS = ["cpu", "triton"]


def cases():
    """(backend, length) pairs."""
    short = LENGTHS if TRITON_DEVICE == "cuda" else INTERPRETED_LENGTHS
    return [("cpu", n) for n in LENGTHS] + [("triton", n) for n in short]


def to_backend(backend, *tensors):
    """The tensors (or None) on the backend's device; skips the test where the backend isn't installed."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    return [None if t is None else t.to(device) for t in tensors]
