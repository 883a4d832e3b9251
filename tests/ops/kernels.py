"""What the kernels' tests share: the backends, where they run, and the lengths that have broken kernels before."""

import pytest
import torch

# On a machine without a GPU, Triton's interpreter runs its kernels on the CPU, slowly (tests/conftest.py).
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 500, 1025]

BACKENDS = ["cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def interpreted(backend):
    """Whether a token costs milliseconds."""
    return backend == "triton" and TRITON_DEVICE == "cpu"


def cases():
    """(backend, length, packed)."""
    every = [(backend, length, packed) for backend in BACKENDS for length in LENGTHS for packed in (False, True)]
    left_out = [(15, False), (15, True), (16, False), (16, True), (500, False), (1025, False), (1025, True)]
    slow = [pytest.mark.long]
    return [
        pytest.param(*case, marks=slow if interpreted(case[0]) and case[1] == 500 else ())
        for case in every
        if not (interpreted(case[0]) and case[1:] in left_out)
    ]


def to_backend(backend, *tensors):
    """The tensors (or None) on the backend's device; skips the test where the backend isn't installed."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    return [None if t is None else t.to(device) for t in tensors]
