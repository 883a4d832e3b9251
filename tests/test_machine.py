"""What is measured of the machine leaves training alone."""

import torch

from m1.machine import gemm_rate


def test_measuring_draws_no_random_numbers_of_training():
    """How many it drew was up to the clock, so that two trainings with one seed differed."""
    before = torch.get_rng_state()
    assert gemm_rate(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), before)
