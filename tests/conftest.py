"""Fixtures every test can use."""

import os
import shutil
import tempfile

# The kernels' and torch's threads share the cores with pytest's: don't spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="m1-datasets-")  # holds prepared data of this session only

import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from checkpoints import save_checkpoint, scramble, tiny_teacher

from m1.model import M1ForCausalLM
from m1.model.convert import convert


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    return save_checkpoint(tiny_teacher(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def hybrid_dir(tmp_path_factory, teacher_dir):
    out = tmp_path_factory.mktemp("hybrid")
    convert(teacher_dir, out, [1, 3])
    return out


@pytest.fixture
def hybrid(hybrid_dir):
    return scramble(M1ForCausalLM.from_pretrained(hybrid_dir).eval())


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(2))
